"""Which tokens of two sequences are the same content: blocks that stand elsewhere in the other.

Greedy string tiling (Wise, "String similarity via greedy string tiling and running Karp-Rabin
matching", 1993): the longest common stretch of tokens that nobody has taken is a block, and so on,
until none of `LEAST` tokens is left. Blocks may stand in any order, and no token is in two.

Legend: N and M tokens of the two sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from moe_lens.metrics.accesses import Ints

LEAST = 4
"""Tokens of a block: shorter stretches are the same by chance."""


@dataclass(frozen=True, order=True)
class Block:
    """Tokens that both sequences have in one order, `size` of them.

    Attributes:
        a: Position of the first one in the first sequence.
        b: In the second.
        size: Tokens.
    """

    a: int
    b: int
    size: int


def common_blocks(a_N: Ints, b_M: Ints, least: int = LEAST) -> list[Block]:
    """The blocks that two sequences of token ids share, by their place in the first.

    Of stretches of one length the first in `a` is taken, then the first in `b`.

    Args:
        a_N: Token ids of the first sequence.
        b_M: Of the second.
        least: Tokens of the shortest block, 1 or more.
    """
    waiting = [(-size, a, b) for a, b, size in _stretches(a_N, b_M, least)]
    heapify(waiting)
    free_N, free_M = np.ones(len(a_N), bool), np.ones(len(b_M), bool)
    found = []
    while waiting:
        size, a, b = heappop(waiting)
        size = -size
        both = free_N[a : a + size] & free_M[b : b + size]
        if both.all():
            free_N[a : a + size] = free_M[b : b + size] = False
            found.append(Block(a, b, size))
            continue
        for begin, end in _runs(both):
            if end - begin >= least:
                heappush(waiting, (begin - end, a + begin, b + begin))
    return sorted(found)


def blocks_at(a_N: Ints, b_M: Ints, shift: int) -> list[Block]:
    """Stretches of the same ids, of any length, whose place in b is that in a plus the shift."""
    return [Block(*x) for x in _at(a_N, b_M, shift, 1)]


def _stretches(a_N: Ints, b_M: Ints, least: int) -> Iterator[tuple[int, int, int]]:
    """Every common stretch that cannot be made longer: where in a, where in b, tokens."""
    for shift in range(1 - len(a_N), len(b_M)):
        yield from _at(a_N, b_M, shift, least)


def _at(a_N: Ints, b_M: Ints, shift: int, least: int) -> Iterator[tuple[int, int, int]]:
    first = max(0, -shift)
    a = a_N[first : len(b_M) - shift]
    same = a == b_M[first + shift : first + shift + len(a)]
    if np.count_nonzero(same) >= least:
        for begin, end in _runs(same):
            if end - begin >= least:
                yield first + begin, first + shift + begin, end - begin


def _runs(is_in: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.diff(is_in.astype(np.int8), prepend=0, append=0)
    return list(
        zip(np.flatnonzero(edges > 0).tolist(), np.flatnonzero(edges < 0).tolist(), strict=True)
    )
