"""Common blocks against a search that tries every stretch, and blocks that were moved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics.alignment import Block, common_blocks

IDS = st.lists(st.integers(0, 3), max_size=14)


def searched(a: list[int], b: list[int], least: int) -> list[Block]:
    """Again and again the longest stretch of tokens that are free in both; the first in a."""
    free_a, free_b = set(range(len(a))), set(range(len(b)))
    found: list[Block] = []
    while True:
        best: tuple[int, int, int] | None = None
        for i in range(len(a)):
            for j in range(len(b)):
                n = 0
                while i + n in free_a and j + n in free_b and a[i + n] == b[j + n]:
                    n += 1
                if n >= least and (best is None or n > best[0]):
                    best = n, i, j
        if best is None:
            return sorted(found)
        n, i, j = best
        found.append(Block(i, j, n))
        free_a -= set(range(i, i + n))
        free_b -= set(range(j, j + n))


@given(a=IDS, b=IDS, least=st.integers(1, 4))
def test_blocks_are_those_of_a_search(a: list[int], b: list[int], least: int) -> None:
    assert common_blocks(np.array(a, int), np.array(b, int), least) == searched(a, b, least)


@given(a=st.lists(st.integers(0, 5), min_size=4, max_size=40))
def test_a_sequence_is_one_block_of_itself(a: list[int]) -> None:
    ids = np.array(a)
    assert common_blocks(ids, ids) == [Block(0, 0, len(a))]


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_moved_blocks_are_found(order: tuple[int, ...]) -> None:
    parts = [np.arange(0, 9), np.arange(20, 25), np.arange(40, 52)]
    begins = [0, 9, 14]
    moved = np.concatenate([parts[i] for i in order])
    at, expected = 0, []
    for i in order:
        expected.append(Block(begins[i], at, len(parts[i])))
        at += len(parts[i])
    found = common_blocks(np.concatenate(parts), moved)
    if order == (0, 2, 1):  # nothing was moved before the first block
        assert found[0] == Block(0, 0, 9)
    assert found == sorted(expected)


def test_short_stretches_are_nothing() -> None:
    assert common_blocks(np.array([1, 2, 3, 9, 4, 5]), np.array([1, 2, 3, 8, 4, 5])) == []
