"""Draws of a uniform router, against routers that are simulated token by token."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics.balance import cv2, dormant_experts, gini, load_entropy, max_vio
from moe_lens.metrics.catalogue import metrics
from moe_lens.metrics.chance import Chance, draws_of, draws_of_forwards, of_draws, uniform_counts
from moe_lens.metrics.evidence import Evidence


def simulated(tokens: int, k: int, experts: int, draws: int, seed: int = 1) -> np.ndarray:
    """Counts of routers whose tokens each sort random numbers and take the first k experts."""
    rng = np.random.default_rng(seed)
    out = np.empty((draws, experts), np.int64)
    for i in range(draws):
        best = np.argpartition(rng.random((tokens, experts)), k - 1, axis=1)[:, :k]
        out[i] = np.bincount(best.ravel(), minlength=experts)
    return out


@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.data()
)  # fmt: skip
def test_every_choice_is_made_by_somebody(
    tokens: int, experts: int, seed: int, data: st.DataObject
) -> None:
    choices = data.draw(st.integers(0, tokens * experts))
    counts = uniform_counts([tokens] * 3, [choices] * 3, experts, np.random.default_rng(seed))
    assert counts.shape == (3, experts)
    assert (counts.sum(1) == choices).all()
    assert counts.min() >= 0
    assert counts.max() <= tokens


def test_the_distribution_is_that_of_all_sets_alike() -> None:
    # Two tokens, two of four experts each: all 36 outcomes can be listed.
    sets = list(combinations(range(4), 2))
    outcomes: dict[tuple[int, ...], int] = {}
    for a in sets:
        for b in sets:
            counts = tuple(np.bincount([*a, *b], minlength=4))
            outcomes[counts] = outcomes.get(counts, 0) + 1
    draws = uniform_counts(np.full(36_000, 2), np.full(36_000, 4), 4, np.random.default_rng(5))
    seen, times = np.unique(draws, axis=0, return_counts=True)
    assert {tuple(x) for x in seen} == set(outcomes)
    for counts, n in zip(seen, times, strict=True):
        expected = 1000 * outcomes[tuple(counts)]
        assert abs(n - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize(("tokens", "k", "experts"), [(256, 8, 64), (100, 1, 16), (64, 3, 4)])
def test_moments(tokens: int, k: int, experts: int) -> None:
    counts = draws_of(tokens, tokens * k, experts)
    mu, share = tokens * k / experts, k / experts
    assert counts.mean() == mu
    # 999 draws of E experts tied by their sum: E - 1 free numbers each.
    spread = np.sqrt(2 / (999 * (experts - 1)))
    assert cv2(counts).mean() == pytest.approx((1 - share) / mu, rel=5 * spread)


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "published"),
    [(2048, 2, 8, 0.055), (2048, 8, 64, 0.135), (16384, 8, 64, 0.049), (4096, 8, 128, 0.165),
     (4096, 8, 256, 0.257), (65536, 8, 256, 0.059)],
)  # fmt: skip
def test_noise_floors_of_max_vio(tokens: int, k: int, experts: int, published: float) -> None:
    chance = of_draws(max_vio(draws_of(tokens, tokens * k, experts)))
    assert chance.expected == pytest.approx(published, rel=0.12)  # of few simulations
    share, mu = k / experts, tokens * k / experts
    bound = np.sqrt(2 * np.log(experts) * (1 - share) / mu)
    assert 0.65 * bound < chance.expected < bound
    assert chance.low is not None
    assert chance.high is not None
    assert chance.low < chance.expected < chance.high


def test_floors_against_a_simulation_token_by_token() -> None:
    tokens, k, experts = 512, 8, 64
    ours, theirs = draws_of(tokens, tokens * k, experts), simulated(tokens, k, experts, 300)
    mu, free = tokens * k / experts, 1 - k / experts
    for function, closed in (
        (max_vio, None),
        (gini, np.sqrt(free / mu / np.pi * (experts - 1) / experts)),
        (load_entropy, np.log(experts) - free / (2 * mu)),
    ):
        a, b = function(ours), function(theirs)
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error
        if closed is not None:
            assert b.mean() == pytest.approx(closed, rel=0.02)


def test_the_bias_of_the_entropy_at_few_experts() -> None:
    # E (1 - k/E) / (2 T k), not (E - 1)(1 - k/E) / (2 T k): at E = 2, k = 1 the half of it.
    counts = draws_of(1000, 1000, 2)
    lost = np.log(2) - load_entropy(counts)
    assert lost.mean() == pytest.approx(1 / 2000, rel=0.2)


def test_groups_leave_the_variance_as_it_is() -> None:
    # Two of four groups for each token, two experts of each group: k = 4 of 16.
    rng, draws = np.random.default_rng(3), []
    for _ in range(200):
        groups = np.argsort(rng.random((128, 4)), 1)[:, :2]
        inside = np.argsort(rng.random((128, 2, 4)), 2)[:, :, :2]
        ids = groups[:, :, None] * 4 + inside
        draws.append(np.bincount(ids.ravel(), minlength=16))
    free = cv2(draws_of(128, 512, 16))
    grouped = cv2(np.array(draws))
    assert grouped.mean() == pytest.approx(free.mean(), rel=0.15)
    assert grouped.std() > free.std()  # experts of a group rise and fall together


def test_draws_of_forwards_have_their_sizes() -> None:
    draws = draws_of_forwards(np.array([5, 90]), np.array([10, 180]), 8)
    assert draws.shape == (199, 2, 8)
    assert (draws.sum(2) == [10, 180]).all()
    assert not draws.flags.writeable  # one cache serves all layers


def test_beyond() -> None:
    chance = of_draws([1.0, 3.0, float("nan")])
    assert chance == Chance(2.0, 1.0, 3.0)
    assert [chance.beyond(x) for x in (0.9, 1.0, 2.0, 3.0 + 1e-13, 3.1)] == (
        ["low", "", "", "", "high"]
    )
    assert Chance(2.0).beyond(99.0) == ""
    assert np.isnan(of_draws([]).expected)


def test_a_uniform_router_is_seldom_called_beyond_chance() -> None:
    """At most one value in 1000 on a side: of 200 routers and 16 metrics about 6."""
    asked = [m for m in metrics().values() if m.drawn and m.reads == ("counts_E",)]
    assert len(asked) >= 14
    marks = 0
    for counts_E in simulated(64, 2, 16, 200, seed=9):
        known = Evidence(experts=16, outputs=16, tokens=64, counts_E=counts_E)
        for each in asked:
            chance = each.by_chance(known)
            assert chance is not None
            marks += chance.beyond(each.value(known)) != ""
    assert marks <= 25  # metrics of one layer rise together


def test_what_is_refused() -> None:
    for tokens, choices in ((2, 9), (0, 1), (2, -1)):
        with pytest.raises(ValueError, match="at most each of 4 experts once"):
            uniform_counts([tokens], [choices], 4, np.random.default_rng(0))


def test_dormant_experts_by_chance() -> None:
    (asked,) = (m for m in metrics().values() if m.function is dormant_experts)
    few = Evidence(experts=64, outputs=64, tokens=83, counts_E=np.full(64, 83 * 8 // 64))
    many = Evidence(experts=64, outputs=64, tokens=83_000, counts_E=np.full(64, 83_000 * 8 // 64))
    few_chance, many_chance = asked.by_chance(few), asked.by_chance(many)
    assert few_chance is not None
    assert many_chance is not None
    # Below a tenth of 10 choices: 0 of 83, with probability (7/8)^83 = 1.5e-5 each.
    assert few_chance.expected < 0.05
    assert many_chance == Chance(0.0, 0.0, 0.0)
