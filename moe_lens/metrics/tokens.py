"""The kept tokens of one layer, in order: what the metrics of expert memory are made of.

Comes from the stored question `token_experts`, which leaves out padding, rejected drafts, choices
that no expert computed, and zero-compute experts.

Legend: T tokens, N choices, E experts of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.accesses import Accesses, Ints, grouped

Unit = Literal["token", "forward"]


@dataclass(frozen=True)
class Tokens:
    """Tokens of one layer; sequences one after another, or forwards, as they were asked for.

    Attributes:
        chosen: The experts of each token.
        nth: `[T]`: number of the token, the same in every layer of its stream; ascending.
        sequences: `[T]`: number of its sequence, from 0 in the order in which they begin.
        positions: `[T]`: position in the sequence.
        forwards: `[T]`: number of its forward, from 0 in the order in which they begin.
        tags: `[T]`.
    """

    chosen: Accesses
    nth: Ints
    sequences: Ints
    positions: Ints
    forwards: Ints
    tags: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.nth)

    @property
    def experts(self) -> int:
        """E."""
        return self.chosen.experts

    @property
    def top_k(self) -> float:
        """Mean of distinct experts that a token ran on."""
        return self.chosen.requests / max(len(self), 1)

    def begins(self) -> Ints:
        """Where each sequence begins.

        Raises:
            ValueError: Sequences are not one after another: the tokens came forward by forward.
        """
        steps = np.diff(self.sequences, prepend=-1)
        if (steps < 0).any():
            raise ValueError("this takes whole sequences one after another: by = sequence")
        begins: Ints = np.flatnonzero(steps).astype(np.int64)
        return begins

    def lengths(self) -> Ints:
        """Tokens of each sequence."""
        return np.diff(np.append(self.begins(), len(self)))[: len(self.begins())]

    def accesses(self, unit: Unit = "token") -> Accesses:
        """What has to be on the device at once: the experts of a token, or of a forward."""
        if unit == "token":
            return self.chosen
        of = self.forwards[self.chosen.of_requests()]
        return grouped(of, self.chosen.expert_ids, int(self.forwards.max(initial=-1)) + 1,
                       self.experts)  # fmt: skip

    def half(self, unit: Unit = "token") -> int:
        """The access at which the second part begins: what is fitted on the first is scored there.

        About half of the tokens, and never inside a sequence unless there is one only; a
        forward is never cut, and of a single one there is no first part: 0.
        """
        if unit == "forward":
            later = np.flatnonzero(np.diff(self.forwards)) + 1
            return int(self.forwards[_nearest(later, len(self) / 2)]) if len(later) else 0
        later = self.begins()[1:]
        return _nearest(later, len(self) / 2) if len(later) else len(self) // 2

    def since(self, first: int) -> Tokens:
        """The tokens from number `first` of these on; sequences keep their numbers."""
        return self._part(slice(first, None), self.chosen.since(first))

    def until(self, end: int) -> Tokens:
        """The tokens before number `end` of these."""
        starts = self.chosen.starts[: end + 1]
        chosen = Accesses(self.experts, self.chosen.expert_ids[: starts[-1]], starts)
        return self._part(slice(end), chosen)

    def _part(self, part: slice, chosen: Accesses) -> Tokens:
        return Tokens(chosen, self.nth[part], self.sequences[part], self.positions[part],
                      self.forwards[part], self.tags[part])  # fmt: skip


def tokens_of(table: pd.DataFrame, experts: int) -> Tokens:
    """Tokens from the answer of `token_experts` for one layer of one run.

    Args:
        table: A row a choice, with the columns nth, rank, sequence, position, step, forward, tag
            and expert, in the order of `nth`.
        experts: E of the layer.
    """
    nth_N = table["nth"].to_numpy(np.int64)
    nth, first, of_N = np.unique(nth_N, return_index=True, return_inverse=True)
    heads = table.iloc[first]
    return Tokens(
        grouped(of_N.astype(np.int64), table["expert"].to_numpy(np.int64), len(nth), experts),
        nth,
        _numbered(heads, ["rank", "sequence"]),
        heads["position"].to_numpy(np.int64),
        _numbered(heads, ["rank", "step", "forward"]),
        heads["tag"].to_numpy(object),
    )


def _nearest(places: Ints, to: float) -> int:
    return int(places[np.abs(places - to).argmin()])


def _numbered(heads: pd.DataFrame, by: list[str]) -> Ints:
    """Groups as numbers from 0, in the order in which they come first."""
    return np.asarray(heads.groupby(by, sort=False).ngroup(), np.int64)
