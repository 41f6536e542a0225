"""Capacity: drops, room and tiles, against loops that fill experts choice by choice."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import capacity
from moe_lens.metrics.catalogue import METRICS, measure
from moe_lens.metrics.chance import draws_of, draws_of_forwards, of_draws, uniform_counts
from moe_lens.metrics.evidence import Evidence

forwards = st.lists(
    st.lists(st.integers(0, 30), min_size=4, max_size=4).filter(any), min_size=1, max_size=5
).map(np.array)


def binomial(n: int, of: int, p: float) -> float:
    ways = math.lgamma(of + 1) - math.lgamma(n + 1) - math.lgamma(of - n + 1)
    return math.exp(ways + n * math.log(p) + (of - n) * math.log1p(-p))


@pytest.mark.parametrize(
    ("experts", "k", "tokens", "dropped"),
    [
        (64, 8, 4096, {1.0: 0.0166, 1.1: 0.0001, 1.25: 0.0, 0.75: 0.25}),
        (128, 1, 8192, {1.0: 0.0498, 1.1: 0.0136, 1.25: 0.0013}),
        (256, 8, 4096, {1.0: 0.0346, 1.1: 0.0055, 1.25: 0.0001, 0.75: 0.25}),
    ],
)
def test_what_a_uniform_router_drops(
    experts: int, k: int, tokens: int, dropped: dict[float, float]
) -> None:
    draws = draws_of(tokens, tokens * k, experts)[:, None, :]
    for factor, golden in dropped.items():
        found = of_draws(capacity.dropped_at(draws, factor)).expected
        # The table is of simulations, rounded; what follows is exact.
        assert found == pytest.approx(golden, abs=7e-5 + 0.1 * golden), factor
        # Each n_i is binomial: E max(0, n_i - C) / mu, term by term.
        room, mu = math.ceil(round(factor * tokens * k / experts, 6)), tokens * k / experts
        over = sum((n - room) * binomial(n, tokens, k / experts) for n in range(room + 1, 4 * room))
        assert found == pytest.approx(over / mu, rel=0.01 if over > 0.1 else 0.1, abs=1e-6), factor


def test_a_zipf_router() -> None:
    # 38.6, 33.1, 21.8, 7.3 % at factors 1, 1.25, 2, 4 (E = 64, k = 8): draws without replacement
    # whose first choices follow 1 / rank.
    rng = np.random.default_rng(0)
    score = -np.log(np.arange(1, 65)) + rng.gumbel(size=(4096, 64))
    n = np.bincount(np.argsort(-score, 1)[:, :8].ravel(), minlength=64)[None]
    for factor, golden in ((1.0, 0.386), (1.25, 0.331), (2.0, 0.218), (4.0, 0.073)):
        assert capacity.dropped_at(n, factor) == pytest.approx(golden, abs=0.01)


@given(forwards, st.integers(5, 40).map(lambda x: x / 10))
def test_drops_against_filling(counts_FE: np.ndarray, factor: float) -> None:
    dropped = room = used = 0
    for row in counts_FE.tolist():
        c = math.ceil(round(factor * sum(row) / 4, 6))
        room += 4 * c
        for n in row:
            for nth in range(n):
                dropped += nth >= c
                used += nth < c
    total = int(counts_FE.sum())
    assert capacity.dropped_at(counts_FE, factor) == pytest.approx(dropped / total)
    capacity_F = capacity.capacity_of(factor, counts_FE.sum(1), 4)
    assert capacity.overflow(counts_FE, capacity_F) == pytest.approx(dropped / total)
    assert capacity.capacity_slack(counts_FE, capacity_F) == pytest.approx(1 - used / room)
    # A stack of draws gives each its own rate.
    both = np.stack([counts_FE, counts_FE[:, ::-1]])
    assert capacity.dropped_at(both, factor) == pytest.approx([dropped / total] * 2)


def test_groups_matter_as_much_as_the_factor() -> None:
    """Forwards that are each skewed, and balanced together: as one group nothing is dropped."""
    counts_FE = np.array([[20, 0], [0, 20]])
    assert capacity.dropped_at(counts_FE, 1.0) == 0.5
    assert capacity.dropped_at(counts_FE.sum(0, keepdims=True), 1.0) == 0


def test_capacity_is_not_rounded_up_by_a_hair() -> None:
    assert capacity.capacity_of(1.2, 10 * 10, 10) == 12
    assert 1.1 * 100 / 10 > 11
    assert capacity.capacity_of(1.1, 100, 10) == 11


def test_overflowed_experts_and_its_null() -> None:
    assert capacity.overflowed_experts(np.array([[0, 3, 1, 0], [0, 0, 0, 0]])) == 0.25
    counts_FE = np.full((8, 16), 16)
    known = Evidence(
        experts=16, outputs=16, overflowed_FE=np.zeros((8, 16), int), counts_FE=counts_FE,
        tokens_F=np.full(8, 128), capacity_F=np.full(8, 18),
    )  # fmt: skip
    found = measure(METRICS["overflowed_experts"], known)
    # n_i is binomial(128, 1/8): the probability of more than 18.
    tail = sum(math.comb(128, n) * 0.125**n * 0.875 ** (128 - n) for n in range(19, 129))
    assert found.chance is not None
    assert found.chance.expected == pytest.approx(tail, rel=0.02)
    assert found.beyond == "low"


def test_four_rates_are_four_numbers() -> None:
    """One token loses all, with little weight; three lose one choice of two."""
    weights = np.array([[0.5, 0.5, 0, 0], [0.9, 0, 0.1, 0], [0, 0.2, 0, 0.8], [0.1, 0.1, 0, 0]])
    dropped = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]], bool)
    mass = capacity.dropped_gate_mass(weights, dropped)
    assert mass == pytest.approx((0.5 + 0.9 + 0.2 + 0.2) / 3.2)
    told = {"overflow_rate": 5 / 8, "dropped_rate": 5 / 8, "unserved_rate": 1 / 4}
    known = Evidence(
        experts=4, outputs=4, top_k=2, dropped_tokens=told, weight_TV=weights, dropped_TV=dropped,
        chosen_TV=weights > 0,
    )  # fmt: skip
    found = measure(METRICS["unserved_rate"], known)
    assert found.value == 0.25
    assert found.chance is not None
    assert found.chance.expected == pytest.approx((5 / 8) ** 2)
    null = measure(METRICS["dropped_gate_mass"], known).chance
    assert null is not None
    assert null.expected == 5 / 8
    assert np.isnan(capacity.dropped_gate_mass(np.zeros((1, 2)), np.ones((1, 2), bool)))


def late(dropped_NT: list[list[int]]) -> float:
    """Of sequences whose tokens each make two choices."""
    dropped_N = np.concatenate([np.array(x, np.int64) for x in dropped_NT])
    position_N = np.concatenate([np.arange(len(x)) for x in dropped_NT])
    ids_NK = np.zeros((len(dropped_N), 3), np.int64)
    ids_NK[:, 2] = -1
    return capacity.late_drops(ids_NK, dropped_N, position_N)


def test_late_drops() -> None:
    assert late([[1] * 40, [0] * 40]) == pytest.approx(1)
    assert late([[0] * 36 + [1] * 4]) == pytest.approx(10)
    assert late([[1] * 36 + [0] * 4]) == 0
    assert late([[0] * 38 + [1, 2], [1] * 10]) == pytest.approx((3 / 8) / (13 / 100))
    assert np.isnan(late([[1] * 9]))  # no tenth of nine


def test_filling_by_position_drops_late_tokens() -> None:
    """The first C tokens of a group never drop; then the rate rises. At random it is flat."""
    rng, T, E, k = np.random.default_rng(1), 400, 8, 2
    lost = {"position": np.zeros(T), "random": np.zeros(T)}
    for _ in range(40):
        ids_TK = np.argsort(-(rng.gumbel(size=(T, E)) + 0.3 * np.arange(E)), 1)[:, :k]
        room = T * k // E
        for name, order in (("position", np.arange(T)), ("random", rng.permutation(T))):
            held = np.zeros(E, int)
            for t in order:
                for e in ids_TK[t]:
                    lost[name][t] += held[e] >= room
                    held[e] += held[e] < room
    assert lost["position"][: T * k // E].sum() == 0
    ids_NK, at_N = np.zeros((T, k * 40), np.int64), np.arange(T)
    found = {
        name: capacity.late_drops(ids_NK, x.astype(np.int64), at_N) for name, x in lost.items()
    }
    assert found["position"] > 1.5
    assert found["random"] == pytest.approx(1, abs=0.15)


@given(forwards, st.integers(1, 16))
def test_tiles(counts_FE: np.ndarray, tile: int) -> None:
    added = sum(math.ceil(n / tile) * tile - n for n in counts_FE.ravel().tolist())
    assert capacity.padded(counts_FE, tile) == pytest.approx(added / counts_FE.sum())
    assert capacity.padded(counts_FE, 1) == 0


def test_the_knee_and_the_factor_that_is_needed() -> None:
    factor = np.arange(50, 401, 5) / 100
    straight = np.maximum(0, 1 - factor)  # perfect balance: nothing is dropped from 1 on
    assert capacity.knee(factor, straight) == 1.0
    assert capacity.smallest(factor, straight) == 1.0
    assert np.isnan(capacity.smallest(factor, np.full(len(factor), 0.3)))
    assert np.isnan(capacity.knee(factor, np.full(len(factor), 0.3)))
    # Half of the choices at one expert of 8, and nothing else uneven.
    n = np.array([[56, 8, 8, 8, 8, 8, 8, 8]])
    dropped = np.array([capacity.dropped_at(n, f) for f in factor])
    assert capacity.smallest(factor, dropped) == pytest.approx(3.9)  # room for 55: one of 112 lost
    assert 0.5 < capacity.knee(factor, dropped) < 1


def test_a_uniform_router_sits_at_its_own_null() -> None:
    tokens_F = np.full(8, 256)
    (counts_FE,) = uniform_counts(tokens_F[None], 2 * tokens_F[None], 16, np.random.default_rng(8))
    factor = np.arange(50, 401, 5) / 100
    dropped = [float(capacity.dropped_at(counts_FE, f)) for f in factor]
    known = Evidence(
        experts=16, outputs=16, tokens=2048, counts_FE=counts_FE, computed_FE=counts_FE,
        tokens_F=tokens_F, capacity_F=np.full(8, 40), overflowed_FE=np.maximum(counts_FE - 40, 0),
        sweep=pd.DataFrame({"capacity_factor": factor, "dropped_share": dropped}),
    )  # fmt: skip
    for name in ("drop_at_1", "drop_at_1_25", "capacity_for_1", "capacity_knee", "tile_padding",
                 "capacity_slack", "overflowed_experts"):  # fmt: skip
        found = measure(METRICS[name], known)
        assert found.beyond == "", name
        assert found.chance is not None
        assert found.chance.high is not None, name
    assert draws_of_forwards(tokens_F, counts_FE.sum(1), 16).shape == (199, 8, 16)
