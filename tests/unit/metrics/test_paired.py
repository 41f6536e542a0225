"""Changes of a token's routing against plain loops over its choices."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics.paired import Routed, by_load, by_octave, changes, elsewhere, parts

EXPERTS = 6


def routed(seed: int, tokens: int = 40, k: int = 3, *, ragged: bool = True) -> Routed:
    rng = np.random.default_rng(seed)
    ids = np.array([rng.choice(EXPERTS, k, replace=False) for _ in range(tokens)])
    weights = np.sort(rng.random((tokens, k)), axis=1)[:, ::-1].copy()
    if ragged:
        short = rng.random(tokens) < 0.3
        ids[short, -1], weights[short, -1] = -1, 0.0
    pair = np.repeat([0, 0, 1, 1, -1], tokens // 5)
    return Routed(ids, weights, True, rng.integers(0, 4, tokens), pair, EXPERTS)


def gates(r: Routed, t: int) -> dict[int, float]:
    assert r.weights_NK is not None
    found = {int(e): w for e, w in zip(r.ids_NK[t], r.weights_NK[t], strict=True) if e >= 0}
    return {e: w / sum(found.values()) for e, w in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_changes(seed: int) -> None:
    r = routed(seed)
    a, b = np.array([0, 3, 16, 17, 20, 5]), np.array([8, 12, 25, 31, 20, 9])
    found = changes(r, a, b)
    for row, (i, j) in enumerate(zip(a, b, strict=True)):
        one, other = gates(r, i), gates(r, j)
        assert found["overlap"][row] == pytest.approx(
            len(one.keys() & other.keys()) / max(len(one), len(other))
        )
        assert found["set_changed"][row] == (one.keys() != other.keys())
        assert found["first_changed"][row] == (next(iter(one)) != next(iter(other)))
        moved = sum(abs(one.get(e, 0) - other.get(e, 0)) for e in range(EXPERTS)) / 2
        assert found["weight_change"][row] == pytest.approx(moved)


@given(seed=st.integers(0, 1000))
def test_a_token_differs_from_itself_by_nothing(seed: int) -> None:
    r = routed(seed)
    every = np.arange(len(r.ids_NK))
    found = changes(r, every, every)
    assert (found["overlap"] == 1).all()
    assert (found[["set_changed", "first_changed", "weight_change"]] == 0).all(axis=None)


def test_what_is_not_known_is_no_number() -> None:
    r = routed(0)
    bare = Routed(r.ids_NK, None, False, None, r.pair_N, EXPERTS)
    a, b = np.array([0, 1]), np.array([8, 9])
    assert changes(bare, a, b)[["first_changed", "weight_change"]].isna().all(axis=None)
    assert elsewhere(bare, a, b).isna().all(axis=None)


@pytest.mark.parametrize("seed", range(4))
def test_elsewhere_is_the_mean_over_tokens_of_other_sequences(seed: int) -> None:
    r = routed(seed)
    assert r.token_id_N is not None
    pairs = [
        (i, j) for i, j in product(range(8), range(8, 16)) if r.token_id_N[i] == r.token_id_N[j]
    ] + [(16 + i, 24 + j) for i, j in product(range(8), range(8))
         if r.token_id_N[16 + i] == r.token_id_N[24 + j]]  # fmt: skip
    a, b = np.array(pairs).T
    found = elsewhere(r, a, b)
    for row, both in enumerate(pairs):
        means = []
        for t in both:
            same_id = np.flatnonzero(r.token_id_N == r.token_id_N[t])
            others = [n for n in same_id.tolist() if r.pair_N[n] != r.pair_N[t]]
            mine = set(gates(r, t))
            sets = [set(gates(r, n)) for n in others]
            means.append((
                np.mean([len(mine & s) / len(mine) for s in sets]),
                np.mean([mine != s for s in sets]),
                np.mean([r.ids_NK[t, 0] != r.ids_NK[n, 0] for n in others]),
            ))  # fmt: skip
        assert found.iloc[row].to_numpy() == pytest.approx(np.mean(means, axis=0))


def test_an_id_that_no_other_sequence_has() -> None:
    r = routed(0)
    ids = np.arange(40) % 8  # the same ids in the two halves of a pair, and in all other pairs
    ids[:16] += 100
    alone = Routed(r.ids_NK, r.weights_NK, True, ids, r.pair_N, EXPERTS)
    assert elsewhere(alone, np.arange(8), np.arange(8, 16)).isna().all(axis=None)
    assert elsewhere(alone, np.arange(16, 24), np.arange(24, 32)).notna().all(axis=None)


@pytest.mark.parametrize("seed", range(3))
def test_any_two_tokens(seed: int) -> None:
    r = routed(seed, ragged=False)
    sets = [set(x.tolist()) for x in r.ids_NK]
    shared = [len(sets[i] & sets[j]) / 3 for i in range(40) for j in range(40) if i != j]
    assert by_load(r.ids_NK, EXPERTS) == pytest.approx(np.mean(shared))


def test_of_one_token_there_are_no_two() -> None:
    assert math.isnan(by_load(np.array([[0, 1]]), EXPERTS))


@given(overlap=st.floats(0, 1), of_id=st.floats(0, 1), random=st.floats(0, 0.99))
def test_the_parts_sum_to_one(overlap: float, of_id: float, random: float) -> None:
    assert sum(parts(overlap, of_id, random).values()) == pytest.approx(1)


def test_the_parts_of_a_lookup_table() -> None:
    assert parts(1.0, 1.0, 0.2) == {"id_part": 1.0, "content_part": 0.0, "order_part": 0.0}


def test_octaves() -> None:
    rows = pd.DataFrame({
        "layer": 0, "distance": [-1, 0, 1, 2, 3, 4, 8], "overlap": [9, 1, 0.5, 0.2, 0.4, 0.6, 0],
        "set_changed": 0.0, "first_changed": np.nan, "weight_change": 0.25,
    })  # fmt: skip
    found = by_octave(rows, "distance")
    assert found[["first", "last", "tokens"]].to_numpy().tolist() == [
        [0, 0, 1], [1, 1, 1], [2, 3, 2], [4, 7, 1], [8, 15, 1]]  # fmt: skip
    assert found["overlap"].tolist() == pytest.approx([1, 0.5, 0.3, 0.6, 0])
