"""Reachable sets against enumeration and published numbers; the most random router likewise."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import richness
from moe_lens.metrics.subsets import (
    by_groups,
    chosen_sets,
    largest_entropy,
    reachable,
    separate_entropy,
    set_draws,
    shares_of,
)


@pytest.mark.parametrize(
    ("experts", "top_k", "sets", "bits"),
    [
        (8, 2, 28, 4.81), (16, 4, 1820, 10.83), (64, 6, 74_974_368, 26.16),
        (64, 8, 4_426_165_368, 32.04), (128, 8, 1.43e12, 40.38), (256, 8, 4.10e14, 48.54),
        (2048, 1, 2048, 11),
    ],
)  # fmt: skip
def test_published_numbers_of_sets(experts: int, top_k: int, sets: float, bits: float) -> None:
    found = reachable(experts, top_k)
    assert found == pytest.approx(sets, rel=0 if sets < 1e11 else 2e-3)
    assert math.log2(found) == pytest.approx(bits, abs=0.005)


def test_the_groups_of_deepseek_v3() -> None:
    found = reachable(256, 8, 8, 4)
    assert found == pytest.approx(7.161e13, rel=1e-4)
    assert found / reachable(256, 8) == pytest.approx(0.175, abs=5e-4)
    assert math.log2(found) == pytest.approx(46.03, abs=0.005)
    shares = by_groups(256, 8, 8)
    wanted = [0, 0, 0.0003, 0.0163, 0.1582, 0.417, 0.3327, 0.0728, 0.0027]
    assert shares.tolist() == pytest.approx(wanted, abs=5e-5)
    assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("experts", [1, 4, 6, 8])
def test_sets_are_those_that_can_be_listed(experts: int) -> None:
    for groups in (g for g in range(1, experts + 1) if experts % g == 0):
        size = experts // groups
        for top_k in range(experts + 1):
            used = Counter(
                len({e // size for e in each}) for each in combinations(range(experts), top_k)
            )
            for top_groups in range(1, groups + 1):
                wanted = sum(n for j, n in used.items() if j <= top_groups)
                assert reachable(experts, top_k, groups, top_groups) == wanted
            shares = by_groups(experts, top_k, groups)
            assert shares * math.comb(experts, top_k) == pytest.approx(
                [used[j] for j in range(groups + 1)]
            )


@pytest.mark.parametrize("given", [(8, 2, 3, 1), (8, 2, 2, 3), (8, 2, 2, 0), (8, 9, 1, 1)])
def test_impossible_routers(given: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        reachable(*given)


def test_sets_have_no_order() -> None:
    ids_NK = np.array([[0, 1], [1, 0], [2, 1], [3, -1], [-1, 3]])
    assert chosen_sets(ids_NK).tolist() == [0, 1, 2]
    assert chosen_sets(np.zeros((0, 2), np.int64)).sum() == 0


@pytest.mark.parametrize(("tokens", "sets"), [(500, 28), (2000, 1820), (4000, 74_974_368)])
def test_draws_show_as_many_sets_as_they_should(tokens: int, sets: int) -> None:
    found_R = richness.distinct(set_draws(tokens, sets))
    wanted = -sets * math.expm1(tokens * math.log1p(-1 / sets))
    spread = found_R.std() / math.sqrt(len(found_R))
    assert abs(found_R.mean() - wanted) <= 3 * spread + 1e-3
    assert (richness.seen(set_draws(tokens, sets)) == tokens).all()


def test_more_sets_than_a_whole_number_holds() -> None:
    found = set_draws(100, math.comb(512, 200))
    assert (richness.distinct(found) == 100).all()


def test_shares_and_coins() -> None:
    ids_NK = np.array([[0, 1], [0, 2], [0, -1], [0, 1]])
    assert shares_of(ids_NK, 4).tolist() == [1, 0.5, 0.25, 0]
    wanted = 1 - 0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert separate_entropy(shares_of(ids_NK, 4)) == pytest.approx(wanted)


def listed(weights: list[float], top_k: int) -> tuple[np.ndarray, float]:
    """Shares and entropy of P(S) ~ product of weights, set by set."""
    sets = list(combinations(range(len(weights)), top_k))
    p = np.array([math.prod(weights[i] for i in each) for each in sets])
    p /= p.sum()
    share_E = np.zeros(len(weights))
    for each, q in zip(sets, p, strict=True):
        share_E[list(each)] += q
    return share_E, float(-(p * np.log2(p)).sum())


@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=7), st.data())
def test_the_most_random_router_against_all_sets(weights: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, len(weights)))
    share_E, entropy = listed(weights, top_k)
    # Its iteration is slowest where weights of 20 stand beside weights of 0.05: 1.1e-5 bits off.
    assert largest_entropy(share_E, top_k) == pytest.approx(entropy, abs=1e-4)


@given(st.lists(st.floats(0.01, 1), min_size=10, max_size=10))
def test_no_router_with_these_shares_is_more_random(weights: list[float]) -> None:
    p = np.array(weights) / sum(weights)
    share_E = np.zeros(5)
    for each, q in zip(combinations(range(5), 3), p, strict=True):
        share_E[list(each)] += q
    assert largest_entropy(share_E, 3) >= -(p * np.log2(p)).sum() - 1e-6


def test_experts_that_all_choose_leave_nothing_open() -> None:
    assert largest_entropy(np.array([1.0, 1.0, 0.0]), 2) == 0
    assert largest_entropy(np.array([1.0, 0.5, 0.5]), 2) == pytest.approx(1)
    assert largest_entropy(np.full(16, 0.25), 4) == pytest.approx(math.log2(1820))
    assert largest_entropy(np.full(256, 8 / 256), 8) == pytest.approx(48.541433)
    with pytest.raises(ValueError, match="sum to 2; got 1"):
        largest_entropy(np.array([0.5, 0.5]), 2)
