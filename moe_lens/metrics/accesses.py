"""What a layer's experts are asked for, in order: `Accesses`, the string that a cache is judged on.

An access is what has to be on the device at once: the experts of a token (decoding, batch 1), or of
all tokens of a forward (batches). Each of its experts is asked for once, however many tokens chose
it: the weights are loaded once.

Legend: A accesses, N requests (distinct experts of accesses, summed), E experts of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Accesses:
    """Sets of experts, one after another.

    Attributes:
        experts: E; ids run from 0 to E - 1.
        expert_ids: `[N]`: the experts of each access, ascending, each once.
        starts: `[A + 1]`: where each access begins in `expert_ids`, and where the last one ends.
    """

    experts: int
    expert_ids: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def requests(self) -> int:
        """N, what a hit rate is a share of."""
        return len(self.expert_ids)

    @property
    def largest(self) -> int:
        """Experts of the largest access: no cache may be smaller."""
        return int(np.diff(self.starts).max(initial=0))

    def of_requests(self) -> Ints:
        """`[N]`: number of the access that each request belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def since(self, first: int) -> Accesses:
        """The accesses from `first` on."""
        begin = self.starts[first]
        return Accesses(self.experts, self.expert_ids[begin:], self.starts[first:] - begin)

    def touched(self) -> NDArray[np.bool_]:
        """`[A, E]`: whether an access asks for an expert."""
        out = np.zeros((len(self), self.experts), bool)
        out[self.of_requests(), self.expert_ids] = True
        return out


def accesses(sets: Iterable[Iterable[int]], experts: int) -> Accesses:
    """Accesses from the expert ids of each, in any order; an id may be named twice.

    Raises:
        ValueError: An id is not one of the experts.
    """
    lists = [np.unique(np.fromiter(ids, np.int64)) for ids in sets]
    starts = np.cumsum([0, *(len(ids) for ids in lists)], dtype=np.int64)
    flat = np.concatenate(lists) if lists else np.zeros(0, np.int64)
    if len(flat) and (flat.min() < 0 or flat.max() >= experts):
        raise ValueError(f"expert ids must be from 0 to {experts - 1}; got {flat.tolist()}")
    return Accesses(experts, flat, starts)


def grouped(of_N: Ints, expert_ids_N: Ints, groups: int, experts: int) -> Accesses:
    """Accesses from pairs of (group, expert) in any order, each pair counted once."""
    pairs = np.unique(of_N * experts + expert_ids_N)
    starts = np.searchsorted(pairs, np.arange(groups + 1) * experts)
    return Accesses(experts, pairs % experts, starts.astype(np.int64))
