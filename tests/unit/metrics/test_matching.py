"""Matching experts of two runs: the assignment against brute force, agreement against truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics.matching import assignment, match, overlap_counts

squares = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-9, 9), min_size=n, max_size=n), min_size=n, max_size=n
    ).map(np.array)
)


def choices(N: int, E: int, K: int, seed: int, rate_E: np.ndarray | None = None) -> np.ndarray:
    """K different experts of each token, more often those of a large rate."""
    rng = np.random.default_rng(seed)
    score_NE = rng.gumbel(size=(N, E)) + (0 if rate_E is None else np.log(rate_E))
    return np.argsort(-score_NE, 1)[:, :K]


@given(squares)
def test_no_other_assignment_gains_more(gain: np.ndarray) -> None:
    found = assignment(gain)
    n = len(gain)
    assert sorted(found.tolist()) == list(range(n))
    best = max(sum(gain[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert gain[np.arange(n), found].sum() == best


def test_a_large_assignment_is_the_planted_one() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.permutation(128)
    gain = rng.random((128, 128))
    gain[np.arange(128), wanted] += 1
    assert (assignment(gain) == wanted).all()


@pytest.mark.parametrize("bad", [np.ones((2, 3)), np.ones(3), np.array([[np.nan]])])
def test_what_is_no_square_of_numbers(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="square of finite numbers"):
        assignment(bad)


def test_overlap_counts_are_those_of_a_loop() -> None:
    a, b = choices(50, 6, 3, 0), choices(50, 6, 2, 1)
    a[::5, 2] = -1
    wanted = np.zeros((6, 6), int)
    for mine, other in zip(a, b, strict=True):
        for i, j in itertools.product(mine, other):
            if i >= 0:
                wanted[i, j] += 1
    assert (overlap_counts(a, b, 6) == wanted).all()


def test_experts_that_were_only_renumbered() -> None:
    a = choices(600, 16, 4, 0)
    a[::7, 3] = -1
    other = np.random.default_rng(1).permutation(16)
    b = np.where(a < 0, -1, other[a])
    found = match(a, b, 16, np.arange(600) // 30)
    assert found is not None
    assert (found.expert_E == other).all()
    assert found.after == 1
    assert found.before < 0.5
    assert found.beyond
    assert found.tokens == 300


def test_agreement_is_that_of_a_loop() -> None:
    a, b = choices(80, 8, 3, 0), choices(80, 8, 2, 1)
    found = match(a, b, 8, np.arange(80) // 10)
    assert found is not None
    held = [n for n in range(80) if n // 10 % 2]
    before = [len(set(a[n]) & set(b[n])) / 3 for n in held]
    after = [len(set(found.expert_E[a[n]]) & set(b[n])) / 3 for n in held]
    assert found.before == pytest.approx(np.mean(before))
    assert found.after == pytest.approx(np.mean(after))


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_independent_runs_stay_within_chance(skew: float) -> None:
    """Even loads, and uneven ones, where experts of like load are matched and agree by that."""
    beyond = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rates = [rng.permutation(np.arange(1, 17) ** -skew) for _ in range(2)]
        a, b = (choices(800, 16, 4, 100 * seed + i, rate) for i, rate in enumerate(rates))
        found = match(a, b, 16, np.arange(800) // 40)
        assert found is not None
        assert found.after == pytest.approx(found.after_by_chance, abs=0.04)
        assert found.after_by_chance > found.before_by_chance - 0.02
        beyond += found.beyond
    assert beyond <= 2  # 1 % of 20 are expected


def test_odd_inputs() -> None:
    a = choices(40, 5, 2, 0)
    assert match(a[:3], a[:3], 5, np.arange(3)) is None
    assert match(a[:0], a[:0], 5, np.arange(0)) is None
    one = match(a, a, 5, np.zeros(40, int))  # one sequence: cut in its middle
    assert one is not None
    assert (one.after, one.tokens) == (1, 20)
    alone = match(np.zeros((8, 1), int), np.zeros((8, 1), int), 1, np.arange(8))
    assert alone is not None
    assert alone.after == alone.after_by_chance == 1
    assert not alone.beyond
