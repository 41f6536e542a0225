"""Pairs and their null: against loops, all sets of small layers, and tables shuffled for real."""

from __future__ import annotations

from itertools import combinations
from math import comb, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_lens.metrics.pairs import Pairs, both, pair_counts

Ids = NDArray[np.int64]
Table = NDArray[np.bool_]


def drawn(tokens: int, experts: int, top_k: int, skew: float, seed: int, least: int = 0) -> Ids:
    """A router that prefers experts, and knows nothing else; with `least`: k varies."""
    rng = np.random.default_rng(seed)
    scores = -skew * np.log(np.arange(1, experts + 1)) + rng.gumbel(size=(tokens, experts))
    ids = np.argsort(-scores, axis=1)[:, :top_k]
    if least:
        sizes = rng.integers(least, top_k + 1, (tokens, 1))
        ids = np.where(np.arange(top_k) < sizes, ids, -1)
    return ids


def table_of(ids: Ids, experts: int) -> Table:
    out = np.zeros((len(ids), experts), bool)
    for token, row in enumerate(ids):
        out[token, row[row >= 0]] = True
    return out


def shuffled(table: Table, rng: np.random.Generator, sweeps: int) -> Table:
    """Two tokens deal out anew what only one of them has; all tables with these margins are alike.

    Strona et al., "A fast and unbiased procedure to randomize ecological binary matrices" (2014).
    """
    out = table.copy()
    for _ in range(sweeps):
        order = rng.permutation(len(out))
        a, b = order[: len(out) // 2], order[len(out) // 2 : len(out) // 2 * 2]
        both, only = out[a] & out[b], out[a] ^ out[b]
        key = np.where(only, rng.random(only.shape), np.inf)
        place = np.argsort(np.argsort(key, axis=1), axis=1)
        mine = place < (out[a] & ~out[b]).sum(1)[:, None]
        out[a], out[b] = both | mine, both | (only & ~mine)
    return out


def tables(ids: Ids, experts: int, draws: int, sweeps: int = 6) -> NDArray[np.int64]:
    """`[draws, E, E]`: pair counts of tables with the margins of this one."""
    rng, table = np.random.default_rng(1), table_of(ids, experts)
    table, out = shuffled(table, rng, 40), []
    for _ in range(draws):
        table = shuffled(table, rng, sweeps)
        out.append(table.T.astype(np.int64) @ table.astype(np.int64))
    return np.stack(out)


ragged = st.lists(st.sets(st.integers(0, 5), max_size=4), max_size=12)


@settings(deadline=None)
@given(ragged)
def test_counts_are_those_of_a_loop(tokens: list[set[int]]) -> None:
    ids = np.full((len(tokens), 4), -1)
    for row, token in zip(ids, tokens, strict=True):
        row[: len(token)] = sorted(token, reverse=True)
    found = pair_counts(ids, 6)
    for i in range(6):
        for j in range(6):
            assert found[i, j] == sum({i, j} <= token for token in tokens)


def test_shuffling_keeps_both_margins_and_reaches_every_table_alike() -> None:
    table = table_of(drawn(200, 9, 3, 1.0, 0, least=1), 9)
    moved = shuffled(table, np.random.default_rng(0), 20)
    assert (moved != table).any()
    assert (moved.sum(0) == table.sum(0)).all()
    assert (moved.sum(1) == table.sum(1)).all()
    # Three tokens with two experts each of three: 6 tables in which each expert is chosen twice.
    small, rng = ~np.eye(3, dtype=bool), np.random.default_rng(3)
    seen: dict[bytes, int] = {}
    for _ in range(3000):
        small = shuffled(small, rng, 3)
        seen[small.tobytes()] = seen.get(small.tobytes(), 0) + 1
    assert len(seen) == 6
    assert max(abs(n - 500) for n in seen.values()) < 5 * np.sqrt(500)


@pytest.mark.parametrize("sizes", [{3: 1.0}, {1: 0.25, 2: 0.25, 4: 0.5}])
def test_pairs_are_those_of_all_sets(sizes: dict[int, float]) -> None:
    """Sets in proportion to the product of their weights, every one of them counted."""
    weights = np.array([0.2, 1.0, 1.0, 3.0, 0.7, 9.0])
    once, twice = np.zeros(6), np.zeros((6, 6))
    for size, share in sizes.items():
        sets = list(combinations(range(6), size))
        total = sum(prod(weights[list(s)]) for s in sets)
        for s in sets:
            p = share * prod(weights[list(s)]) / total
            once[list(s)] += p
            for i, j in combinations(s, 2):
                twice[i, j] += p
                twice[j, i] += p
    shares = np.array([sizes.get(d, 0.0) for d in range(max(sizes) + 1)])
    assert both(once, shares) == pytest.approx(twice, abs=1e-8)


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (8, 2), (12, 5), (6, 5)])
def test_equal_loads_have_closed_forms(experts: int, top_k: int) -> None:
    """A table in which every expert is chosen as often: all rotations of one set."""
    ids = (np.arange(experts)[:, None] + np.arange(top_k)) % experts
    pairs = Pairs(np.tile(ids, (3, 1)), experts)
    p, q = top_k / experts, comb(top_k, 2) / comb(experts, 2)
    away = ~np.eye(experts, dtype=bool)
    assert pairs.expected_EE[away] / pairs.tokens == pytest.approx(q)
    assert pairs.expected_EE[0, 1] / pairs.chosen_E[0] == pytest.approx((top_k - 1) / (experts - 1))
    # What of X_i X_j is left when X_i + X_j, of variance 2 (p - 2 p^2 + q), is known.
    left = q * (1 - q) - (2 * q * (1 - p)) ** 2 / (2 * (p - 2 * p * p + q))
    assert pairs.variance_EE[away] / pairs.tokens == pytest.approx(left, abs=1e-7)
    if (experts, top_k) == (64, 8):
        assert pairs.expected_EE[0, 1] / pairs.chosen_E[0] == pytest.approx(0.1111, abs=5e-5)


@pytest.mark.parametrize(
    ("experts", "top_k", "skew", "least"),
    [(8, 2, 1.0, 0), (10, 4, 1.5, 0), (12, 4, 0.0, 0), (9, 4, 1.0, 1)],
)
def test_null_is_that_of_shuffled_tables(experts: int, top_k: int, skew: float, least: int) -> None:
    ids = drawn(400, experts, top_k, skew, 5, least)
    pairs = Pairs(ids, experts)
    at = pairs.places_P
    real = tables(ids, experts, 400)[:, at[0], at[1]]
    open_ = real.std(0) > 0
    sd = real.std(0)[open_]
    off = (real.mean(0) - pairs.expected_EE[at])[open_] / (sd / np.sqrt(len(real)))
    assert abs(off).max() < 5  # the chain's draws are a little alike
    assert np.sqrt((off**2).mean()) < 1.7
    assert np.sqrt(pairs.variance_EE[at])[open_] / sd == pytest.approx(1, abs=0.2)
    assert np.mean(np.sqrt(pairs.variance_EE[at])[open_] / sd) == pytest.approx(1, abs=0.04)
    # And what becomes of it: how far the furthest pair is, and all of them together.
    sds = np.sqrt(pairs.variance_EE[at])[open_]
    far = [abs(x - pairs.expected_EE[at])[:, open_] for x in (real, pairs.draws_RP)]
    furthest, together = zip(*(((x / sds).max(1), x.sum(1)) for x in far), strict=True)
    assert furthest[1].mean() == pytest.approx(furthest[0].mean(), rel=0.06)
    assert together[1].mean() == pytest.approx(together[0].mean(), rel=0.05)
    assert together[1].std() == pytest.approx(together[0].std(), rel=0.25)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_draws_keep_the_loads(skew: float) -> None:
    pairs = Pairs(drawn(2000, 16, 4, skew, 0), 16)
    i, j = pairs.places_P
    for e in range(16):
        sums = pairs.draws_RP[:, (i == e) | (j == e)].sum(1)
        assert sums == pytest.approx(3 * pairs.chosen_E[e], rel=1e-5)
    assert pairs.draws_RP.std(0) / np.sqrt(pairs.variance_EE[i, j]) == pytest.approx(1, abs=0.3)
    assert len({x.tobytes() for x in pairs.draws_RP}) == 199


def test_draws_of_rare_pairs_are_as_skewed_as_counts() -> None:
    ids = drawn(300, 16, 2, 0.0, 2)
    pairs = Pairs(ids, 16)
    real = tables(ids, 16, 400)[:, pairs.places_P[0], pairs.places_P[1]]
    skews = []
    for draws in (real, pairs.draws_RP):
        z = (draws - draws.mean(0)) / draws.std(0)
        skews.append((z**3).mean(0).mean())
    assert skews[0] > 0.3
    assert skews[1] == pytest.approx(skews[0], abs=0.15)  # the sums cost a little of it


def test_a_table_that_its_margins_decide_has_no_null() -> None:
    three = Pairs(drawn(100, 3, 2, 0.5, 0), 3)  # N_01 = N - n_2
    everybody = Pairs(np.tile(np.arange(4), (10, 1)), 4)
    single = Pairs(drawn(50, 6, 1, 0.5, 0), 6)
    for pairs in (three, everybody, single):
        assert not pairs.variance_EE.any()
        assert pairs.expected_EE[pairs.places_P] == pytest.approx(pairs.together_P, abs=1e-6)
        assert (pairs.draws_RP == pairs.together_P).all()
        assert np.isnan(pairs.z_EE).all()


def test_experts_of_all_or_none_leave_the_others_their_null() -> None:
    rest = drawn(300, 6, 2, 0.7, 1)
    alone = Pairs(rest, 6)
    ids = np.hstack([np.full((300, 1), 6), rest])  # 6 by every token, 7 by none
    beside = Pairs(ids, 8)
    assert beside.expected_EE[:6, :6] == pytest.approx(alone.expected_EE)
    assert beside.variance_EE[:6, :6] == pytest.approx(alone.variance_EE)
    assert beside.expected_EE[6, :6] == pytest.approx(alone.chosen_E)
    assert not beside.variance_EE[6].any()
    assert not beside.expected_EE[7].any()
    # Tokens that chose none say nothing, either.
    padded = Pairs(np.vstack([ids, np.full((50, 3), -1)]), 8)
    assert padded.expected_EE == pytest.approx(beside.expected_EE)
    assert padded.variance_EE == pytest.approx(beside.variance_EE)


@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (2, 0), (5, 1)])
def test_next_to_nothing(shape: tuple[int, int]) -> None:
    for experts in (1, 2, 5):
        if shape[1] <= experts:
            ids = np.tile(np.arange(shape[1]), (shape[0], 1)).astype(np.int64)
            pairs = Pairs(ids, experts)
            assert pairs.draws_RP.shape == (199, comb(experts, 2))
            assert (pairs.draws_RP == pairs.together_P).all()
