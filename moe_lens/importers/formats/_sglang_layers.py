"""Which decoder blocks have experts, in dumps of SGLang's recorder: those with any choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.blocks import Blocks
from moe_lens.importers.source import Given
from moe_lens.trace.meta import LayerInfo


def layers_of(
    routed_B: NDArray[np.bool_],
    experts: int,
    given: Given,
    path: Path,
    top_k: int | None = None,
) -> tuple[list[int], list[LayerInfo], dict[str, int]]:
    """The blocks with experts, their layers, and what was taken note of.

    Args:
        routed_B: Blocks in which the file has any choice.
        experts: E, as the file has it.
        given: Checked against the file; blocks are believed to be dense where it says nothing.
        path: The file, for errors.
        top_k: K, as the file has it; None: it does not say.

    Raises:
        ImportRefused: `given` and the file differ, or K is not known.
    """
    if given.experts not in (None, experts):
        raise ImportRefused(f"{path} is of {experts} experts, but {given.experts} were given.")
    if given.blocks not in (None, len(routed_B)):
        raise ImportRefused(
            f"{path} is of {len(routed_B)} decoder blocks, but {given.blocks} were given."
        )
    if top_k is not None and given.top_k not in (None, top_k):
        raise ImportRefused(f"{path} is of top-{top_k}, but top-{given.top_k} was given.")
    if top_k is None:
        top_k = given.top_k
    if top_k is None:
        raise ImportRefused(f"{path} does not say how many experts a token chooses: give --top-k.")
    empty = [int(b) for b in np.flatnonzero(~routed_B)]
    notes = {}
    if given.dense_blocks is None and empty:
        names = ", ".join(str(b) for b in empty)
        notes[f"blocks without any choice, taken for dense ones: {names}"] = len(empty)
    if given.dense_blocks is not None:
        _check_dense(set(given.dense_blocks), set(empty), path)
    blocks = Blocks(len(routed_B), experts, top_k, tuple(empty))
    return list(blocks.sparse), blocks.layers(given, "sglang"), notes


def _check_dense(dense: set[int], empty: set[int], path: Path) -> None:
    if silent := empty - dense:
        raise ImportRefused(
            f"{path}: block {min(silent)} has no choice in any pass, and is not one of the dense "
            "blocks given: the recorder did not see it."
        )
    if speaking := dense - empty:
        raise ImportRefused(
            f"{path}: block {min(speaking)} is given as dense, but has choices of experts "
            "(or is not there)."
        )
