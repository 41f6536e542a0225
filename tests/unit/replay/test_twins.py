"""Twins run as many rows as the routing, as even as can be, and no expert twice for a token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.replay.twins import balanced, same_touched


@st.composite
def workloads(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 9))
    ids = [draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    kept = [[draw(st.booleans()) for _ in range(top_k)] for _ in range(tokens)]
    ids_TK = np.array(ids, np.int32).reshape(tokens, top_k)
    return np.where(np.array(kept, bool).reshape(tokens, top_k), ids_TK, -1), experts


@given(workloads())
def test_the_balanced_twin(given: tuple[np.ndarray, int]) -> None:
    ids_TK, experts = given
    twin_TK = balanced(ids_TK, experts)
    check(ids_TK, twin_TK, list(range(experts)))


@given(workloads())
def test_the_same_touched_twin(given: tuple[np.ndarray, int]) -> None:
    ids_TK, _ = given
    check(ids_TK, same_touched(ids_TK), sorted({e for e in ids_TK.ravel().tolist() if e >= 0}))


def check(ids_TK: np.ndarray, twin_TK: np.ndarray, over: list[int]) -> None:
    assert twin_TK.dtype == np.int32
    assert ((twin_TK >= 0) == (ids_TK >= 0)).all()
    for row in twin_TK.tolist():
        runs = [e for e in row if e >= 0]
        assert len(set(runs)) == len(runs)
    slots = int((ids_TK >= 0).sum())
    loads = [int((twin_TK == e).sum()) for e in over]
    assert sum(loads) == slots
    assert not loads or max(loads) - min(loads) <= 1
    assert sum(n > 0 for n in loads) == min(len(over), slots)


def test_exactly() -> None:
    ids_TK = np.array([[5, 2], [5, 3], [2, -1]], np.int32)
    assert balanced(ids_TK, 8).tolist() == [[0, 1], [2, 3], [4, -1]]
    assert same_touched(ids_TK).tolist() == [[2, 3], [5, 2], [3, -1]]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(4096, 64, 8), (64, 256, 8), (1, 8, 2)])
def test_all_experts_are_touched_as_far_as_there_are_slots(
    tokens: int, experts: int, top_k: int
) -> None:
    twin = balanced(np.zeros((tokens, top_k), np.int32), experts)
    assert len(np.unique(twin)) == min(experts, tokens * top_k)
