"""The tokens of one forward: which sequence, position and tag each has, and which are padding.

Made by `describe`; here is what it is, and how it lands on the host.

Legend: B sequences (rows), S positions, T = B S tokens, P sequences (B, or how many are packed),
G tags, N sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.trace.events import SequenceRow
from moe_lens_hooks.owners import Owners


@dataclass
class Batch:
    """The tokens of one forward, on the model's device where tensors.

    Attributes:
        shape: (B, S).
        tags: Names of the tags, G.
        group_T: int; tag, or G + tag for padding. None: one tag and no padding.
        padded: There may be padding: groups are 2 G.
        tokens_G: Valid tokens by tag.
        owners: The sequences.
        tag_P: Index of the tag of each sequence (host); None: tags are per token.
        tag_T: Index of the tag of each token (host); None: tags are per sequence.
        padding_T: bool: padding, or routed by an earlier forward already; None: no such token.
        token_N: Sampled tokens (host); None: none.
        rows_N: The same on the model's device.
        position_N: Their positions in their sequences.
        begin_P: Sequences that the table `sequences` is to be told of, if they have a token.
        keys: The user's further columns, by name, a value for each of the user's sequences.
        restarts: How often positions start again in a row that counts as one sequence.
    """

    shape: tuple[int, int]
    tags: list[str]
    group_T: Tensor | None
    padded: bool
    tokens_G: Tensor
    owners: Owners
    tag_P: NDArray[np.int64] | None
    tag_T: NDArray[np.int64] | None
    padding_T: Tensor | None
    token_N: NDArray[np.int64] | None
    rows_N: Tensor | None
    position_N: Tensor | None
    begin_P: list[int] = field(default_factory=list)
    keys: dict[str, list[str | None]] = field(default_factory=dict)
    restarts: Tensor | None = None

    @property
    def size(self) -> int:
        """T."""
        return self.shape[0] * self.shape[1]

    def drop_rows(self) -> None:
        """Give up the sampled rows."""
        self.token_N = self.rows_N = self.position_N = None

    def tensors(self) -> list[Tensor]:
        """What has to land on the host, in the order in which `land` takes it."""
        owner_T = self.owners.owner_T
        maybe = (self.padding_T, self.position_N, self.restarts)
        parts: list[Tensor | None] = [self.tokens_G, *maybe]
        parts += [owner_T] if isinstance(owner_T, Tensor) else []
        return [t for t in parts if t is not None]

    def land(self, landed: Iterator[NDArray[Any]]) -> Landed:
        """This batch on the host.

        Args:
            landed: Of `tensors`, in their order.
        """
        tokens_G = next(landed)
        names = ("padding_T", "position_N", "restarts")
        here = {n: None if getattr(self, n) is None else next(landed) for n in names}
        owner_T = self.owners.owner_T
        at_T: NDArray[np.int64] = next(landed) if isinstance(owner_T, Tensor) else owner_T
        if self.tag_P is not None:
            tag_T = self.tag_P[at_T]
        else:
            assert self.tag_T is not None
            tag_T = self.tag_T
        numbers_P = np.array([x.number for x in self.owners.lines], np.int64)
        restarts = here.pop("restarts")
        return Landed(
            tokens_G=tokens_G,
            sequences_G=self._sequences(at_T, tag_T, here["padding_T"]),
            sequence_T=numbers_P[at_T],
            tag_T=tag_T,
            token_N=self.token_N,
            begin=self._begin(at_T, tag_T),
            restarts=0 if restarts is None else int(restarts),
            **here,
        )

    def _sequences(
        self,
        at_T: NDArray[np.int64],
        tag_T: NDArray[np.int64],
        padding_T: NDArray[np.bool_] | None,
    ) -> NDArray[np.int64]:
        """Sequences that have a valid token, by the tag of the first."""
        if padding_T is not None:
            at_T, tag_T = at_T[~padding_T], tag_T[~padding_T]
        tag_P, present_P = self._tag_of(at_T, tag_T)
        return np.bincount(tag_P[present_P], minlength=len(self.tags)).astype(np.int64)

    def _tag_of(
        self, at_T: NDArray[np.int64], tag_T: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tag of each sequence's first token, and whether it has one."""
        P = len(self.owners.lines)
        present_P = np.bincount(at_T, minlength=P) > 0
        if self.tag_P is not None:
            return self.tag_P, present_P
        tag_P = np.zeros(P, np.int64)
        tag_P[at_T[::-1]] = tag_T[::-1]  # the first token's is written last
        return tag_P, present_P

    def _begin(self, at_T: NDArray[np.int64], tag_T: NDArray[np.int64]) -> list[SequenceRow]:
        if not self.begin_P:
            return []
        tag_P, present_P = self._tag_of(at_T, tag_T)
        rows = []
        for p in self.begin_P:
            if not present_P[p]:
                continue
            line, row = self.owners.lines[p], self.owners.row_P[p]
            rows.append(
                SequenceRow(
                    sequence=line.number,
                    tag=self.tags[tag_P[p]],
                    request=None if line.request is None else str(line.request),
                    parent=line.parent,
                    keys={name: values[row] for name, values in self.keys.items()},
                )
            )
        return rows


@dataclass
class Landed:
    """A `Batch` on the host, by the same names; and what follows from it.

    Attributes:
        sequences_G: Sequences with a valid token, by tag.
        sequence_T: Number of each token's sequence on this rank.
        begin: Rows for the table `sequences`.
    """

    tokens_G: NDArray[np.int64]
    sequences_G: NDArray[np.int64]
    sequence_T: NDArray[np.int64]
    tag_T: NDArray[np.int64]
    padding_T: NDArray[np.bool_] | None
    token_N: NDArray[np.int64] | None
    position_N: NDArray[np.int64] | None
    begin: list[SequenceRow]
    restarts: int
