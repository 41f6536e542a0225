"""Which rows of a serving engine's arrays are layers with experts, and whether an array fits.

Engines size their arrays by decoder blocks: one without experts has a row too, which nobody fills.

T tokens, B decoder blocks, L of them with experts, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moe_lens.errors import ImportRefused
from moe_lens.importers.source import Given, Ints
from moe_lens.trace.meta import LayerInfo


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model.

    Attributes:
        count: B.
        experts: Of a layer.
        top_k: K.
        dense: Blocks without experts.
    """

    count: int
    experts: int
    top_k: int
    dense: tuple[int, ...] = ()
    sparse: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        left = tuple(b for b in range(self.count) if b not in self.dense)
        object.__setattr__(self, "sparse", left)

    def layers(self, given: Given, adapter: str) -> list[LayerInfo]:
        """The layers with experts, numbered from 0; `adapter` is the format's name."""
        return [
            LayerInfo(
                layer=i,
                path=f"model.layers.{block}.mlp",
                experts=self.experts,
                top_k=self.top_k,
                block=block,
                adapter=adapter,
                hidden_size=given.hidden_size,
                intermediate_size=given.intermediate_size,
            )
            for i, block in enumerate(self.sparse)
        ]

    def take(self, ids_TBK: Ints, where: str) -> Ints:
        """The rows of layers with experts, `[T, L, K]`; a view wherever numpy can.

        Raises:
            ImportRefused: Another shape, no integers, too narrow ones, or choices in a block that
                has no experts.
        """
        if ids_TBK.ndim != 3 or ids_TBK.shape[1:] != (self.count, self.top_k):
            raise ImportRefused(
                f"{where}: an array of {ids_TBK.shape}, not of [tokens, {self.count} decoder "
                f"blocks, top-{self.top_k}]."
            )
        if ids_TBK.dtype.kind not in "iu":
            raise ImportRefused(f"{where}: expert ids are {ids_TBK.dtype}, not integers.")
        if self.experts - 1 > np.iinfo(ids_TBK.dtype).max:
            raise ImportRefused(
                f"{where}: ids are {ids_TBK.dtype}, which has no room for {self.experts} experts: "
                "the number of experts is another, or the ids were cut off."
            )
        if not self.dense:
            return ids_TBK
        dense_TDK = ids_TBK[:, list(self.dense)]
        if dense_TDK.any():
            t, d, k = (int(x) for x in np.argwhere(dense_TDK)[0])
            raise ImportRefused(
                f"{where}, block {self.dense[d]}, token {t}: expert {int(dense_TDK[t, d, k])} in a "
                "block that was given as one without experts (--dense-blocks, --config)."
            )
        first, last = self.sparse[0], self.sparse[-1]
        if last - first + 1 == len(self.sparse):
            return ids_TBK[:, first : last + 1]
        return ids_TBK[:, list(self.sparse)]


def blocks_of(given: Given, shape: tuple[int, ...], where: str) -> Blocks:
    """The blocks of arrays of a shape, with what the user says of them.

    Args:
        given: Must have the experts; all else that it has must agree.
        shape: `[T, B, K]` of an array.
        where: The place in the file, for errors.

    Raises:
        ImportRefused: Experts are not given, or something contradicts the array.
    """
    if len(shape) != 3:
        raise ImportRefused(
            f"{where}: an array of {shape}, not of [tokens, decoder blocks, top-k]."
        )
    _, B, K = shape
    if not B or not K:
        raise ImportRefused(f"{where}: an array of {shape} has no choice in it.")
    if given.experts is None:
        raise ImportRefused(
            f"{where}: expert ids do not say of how many experts: give --experts N, or --config "
            "with the model's config.json."
        )
    if given.top_k not in (None, K):
        raise ImportRefused(f"{where}: {K} choices a token, but top-{given.top_k} was given.")
    if given.experts < K:
        raise ImportRefused(f"{where}: {K} choices a token of {given.experts} experts.")
    if given.blocks not in (None, B):
        raise ImportRefused(
            f"{where}: {B} rows a token, but the model has {given.blocks} decoder blocks: the "
            "configuration is another model's, or the axes are in another order."
        )
    dense = tuple(sorted(set(given.dense_blocks or ())))
    if dense and not 0 <= dense[0] <= dense[-1] < B:
        odd = dense[0] if dense[0] < 0 else dense[-1]
        raise ImportRefused(f"{where}: there is no block {odd} in {B} decoder blocks.")
    if len(dense) == B:
        raise ImportRefused(f"{where}: all {B} blocks are given as ones without experts.")
    return Blocks(B, given.experts, K, dense)
