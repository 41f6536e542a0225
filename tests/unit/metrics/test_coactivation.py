"""Co-activation: against loops over tokens, the stored question, and what was planted."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.planted import layer_of

from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.coactivation import (
    EXPECTED,
    FEWEST,
    associations,
    bundles,
    co_activation,
    largest_lift,
    largest_share,
)
from moe_lens.metrics.evidence import Evidence
from moe_lens.metrics.pairs import Pairs
from moe_lens.queries.session import open_trace
from moe_lens.trace.synthetic import Hot, Pair, Spec

NAMES = [m.name for m in metrics().values() if m.group == "coactivation"]


def random(tokens: int, experts: int, top_k: int, skew: float, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    scores = -skew * np.log(np.arange(1, experts + 1)) + rng.gumbel(size=(tokens, experts))
    return np.argsort(-scores, axis=1)[:, :top_k]


def found(ids: NDArray[np.int64], experts: int) -> dict[str, Measured]:
    known = Evidence(experts=experts, outputs=experts, ids_NK=ids)
    return {name: measure(METRICS[name], known) for name in NAMES}


tokens_of_some = st.lists(st.permutations(range(5)).map(lambda p: p[: p[0]]), max_size=15)
"""Up to four of five experts, in some order."""


def padded(tokens: list[list[int]]) -> NDArray[np.int64]:
    ids = np.full((len(tokens), 4), -1)
    for row, token in zip(ids, tokens, strict=True):
        row[: len(token)] = token
    return ids


@settings(deadline=None)
@given(tokens_of_some)
def test_shares_of_all_pairs_and_of_neighbours(tokens: list[list[int]]) -> None:
    paper, release = (co_activation(padded(tokens), 5, mode) for mode in ("paper", "release"))
    for i in range(5):
        chosen = sum(i in token for token in tokens)
        for j in range(5):
            if i == j or not chosen:
                assert np.isnan([paper[i, j], release[i, j]]).all()
                continue
            both = sum(i in token and j in token for token in tokens)
            beside = sum({i, j} == {a, b} for token in tokens for a, b in pairwise(token))
            assert paper[i, j] == pytest.approx(both / chosen)
            assert release[i, j] == pytest.approx(beside / chosen)


def test_the_released_script_counts_k_over_2_times_fewer() -> None:
    """OLMoE, 8 of 64: .1111 by eq. 6, .0278 by scripts/run_moe_analysis.py, whatever the draw."""
    ids = random(2048, 64, 8, 0.0, 0)
    n = Pairs(ids, 64).chosen_E
    means = [
        np.nansum(co_activation(ids, 64, mode) * n[:, None]) / n.sum() / 63
        for mode in ("paper", "release")
    ]
    assert means[0] == pytest.approx(7 / 63)
    assert means[1] == pytest.approx(2 * 7 / 8 / 63)
    assert means[0] == pytest.approx(0.1111, abs=5e-5)
    assert means[1] == pytest.approx(0.0278, abs=5e-5)
    with pytest.raises(ValueError, match="got 'olmoe'"):
        co_activation(ids, 64, "olmoe")  # type: ignore[arg-type]


@settings(deadline=None)
@given(tokens_of_some)
def test_how_two_experts_go_together(tokens: list[list[int]]) -> None:
    rows = associations(padded(tokens), 5).to_dict("records")
    sets, total = [set(t) for t in tokens], len(tokens)
    n = [sum(e in s for s in sets) for e in range(5)]
    wanted = [(i, j) for i in range(5) for j in range(i + 1, 5) if n[i] and n[j]]
    assert [(r["expert"], r["other"]) for r in rows] == wanted
    for row in rows:
        i, j = row["expert"], row["other"]
        both = sum({i, j} <= s for s in sets)
        assert row["together"] == both
        assert row["lift"] == pytest.approx(both * total / (n[i] * n[j]))
        assert row["pmi"] == pytest.approx(math.log(row["lift"]) if both else -math.inf)
        assert row["jaccard"] == pytest.approx(both / sum(bool({i, j} & s) for s in sets))
        columns = np.array([[e in s for s in sets] for e in (i, j)], float)
        if n[i] < total and n[j] < total:
            assert row["phi"] == pytest.approx(np.corrcoef(columns)[0, 1])
        else:
            assert np.isnan(row["phi"])


def test_the_stored_question_has_the_same_numbers(tmp_path: Path) -> None:
    spec = Spec(
        layers=1, experts=12, top_k=3, planted=(Pair(2, 7, together=0.8),), popularity="zipf"
    )
    known = layer_of(spec, tmp_path / "run", "coactivation")
    assert known.ids_NK is not None
    with open_trace(tmp_path / "run") as trace:
        rows = trace.query("co_activation", layer=0, most=None).df()
    share = co_activation(known.ids_NK, 12)
    mine = associations(known.ids_NK, 12).set_index(["expert", "other"])
    assert len(rows) == 12 * 11
    for row in rows.to_dict("records"):
        i, j = int(row["expert"]), int(row["other"])
        assert row["share"] == pytest.approx(share[i, j])
        assert row["lift"] == pytest.approx(mine.loc[(min(i, j), max(i, j)), "lift"])
    assert METRICS["co_activation_max"].value(known) == pytest.approx(rows["share"].max())
    assert METRICS["co_activation_lift_max"].value(known) == pytest.approx(rows["lift"].max())


def test_planted_pairs_are_found(tmp_path: Path) -> None:
    planted = (Hot(0, share=0.7), Pair(3, 11, together=0.9), Pair(5, 6, together=0.9))
    spec = Spec(layers=1, experts=24, top_k=6, planted=planted, popularity="zipf", skew=0.5)
    known = layer_of(spec, tmp_path / "run", "coactivation")
    assert known.ids_NK is not None
    assert bundles(known.ids_NK, 24) == [(3, 11), (5, 6)]
    result = {name: measure(METRICS[name], known) for name in NAMES}
    # The larger of four shares of a quarter of the tokens.
    error = (0.9 * 0.1 / (len(known.ids_NK) / 4)) ** 0.5
    assert result["co_activation_max"].value == pytest.approx(0.9, abs=5 * error)
    # Lift of a pair is together / share, and the share is k/E.
    assert result["co_activation_lift_max"].value == pytest.approx(0.9 / 0.25, rel=0.1)
    assert [x.beyond for x in result.values()] == ["high"] * 3
    rows = associations(known.ids_NK, 24).sort_values("z").tail(2)
    assert set(zip(rows["expert"], rows["other"], strict=True)) == {(3, 11), (5, 6)}


def test_bundles_are_what_ties_connect() -> None:
    """Half of the tokens choose from one of two groups of four, the others anything."""
    rng = np.random.default_rng(0)
    groups = [[1, 4, 9, 10], [0, 2, 3, 15], list(range(16))]
    ids = np.stack([rng.choice(groups[max(t % 4 - 1, 0)], 3, replace=False) for t in range(4000)])
    assert bundles(ids, 16)[:2] != []
    apart = np.stack([rng.choice(groups[t % 2], 3, replace=False) for t in range(400)])
    assert bundles(apart, 16, lift=1.1) == [(0, 2, 3, 15), (1, 4, 9, 10)]
    assert bundles(apart[::2], 16) == []  # loads alone: all choose from one group
    assert bundles(ids, 16, lift=100) == []


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_loads_alone_are_within_the_null(skew: float) -> None:
    """Each metric is beyond by chance in one of a hundred; a bundle in one of two hundred."""
    beyond, bundled = 0, 0
    for seed in range(30):
        ids = random(600, 16, 4, skew, seed)
        beyond += sum(x.beyond != "" for x in found(ids, 16).values())
        bundled += len(bundles(ids, 16, lift=1.0))
    assert beyond <= 4
    assert bundled <= 1


def test_values_are_those_of_loops() -> None:
    # Two rare experts, always together: of so few tokens nothing is concluded.
    ids = np.vstack([random(300, 8, 3, 1.0, 4), [[8, 9, 0]] * 12])
    pairs, rows = Pairs(ids, 10), associations(ids, 10)
    n, total = pairs.chosen_E, len(ids)
    shares, lifts, far = [], [], 0.0
    for row in rows.to_dict("records"):
        i, j, both = row["expert"], row["other"], row["together"]
        shares += [both / n[e] for e in (i, j) if n[e] >= FEWEST]
        lifts += [row["lift"]] if n[i] * n[j] / total >= EXPECTED else []
        far += abs(both - row["expected"])
    assert max(shares) < 1
    assert max(lifts) < rows["lift"].max()
    result = found(ids, 10)
    assert result["co_activation_max"].value == pytest.approx(max(shares))
    assert result["co_activation_lift_max"].value == pytest.approx(max(lifts))
    assert result["co_activation_excess"].value == pytest.approx(far / 2 / (3 * total))
    # The null is the same function of draws.
    assert largest_share(pairs.draws_RP, pairs) == pytest.approx(
        [largest_share(x, pairs) for x in pairs.draws_RP]
    )
    chance = result["co_activation_lift_max"].chance
    assert chance is not None
    assert chance.high == pytest.approx(largest_lift(pairs.draws_RP, pairs).max())


def test_excess_is_0_where_loads_say_everything_and_grows_with_structure() -> None:
    together = np.tile([[0, 1], [2, 3]], (200, 1))  # never 0 with 2
    assert found(together, 4)["co_activation_excess"].value == pytest.approx(2 / 3)
    assert found(together, 4)["co_activation_max"].value == 1
    assert found(together, 4)["co_activation_lift_max"].value == pytest.approx(2)
    decided = found(np.argsort(np.random.default_rng(0).random((500, 3)), axis=1)[:, :2], 3)
    assert decided["co_activation_excess"].value == pytest.approx(0, abs=1e-6)
    assert all(x.beyond == "" for x in decided.values())


@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        (np.empty((0, 2), np.int64), 4),
        (np.zeros((90, 1), np.int64), 4),  # one choice: no pairs
        (np.zeros((90, 1), np.int64), 1),
        (np.full((90, 2), -1), 4),
    ],
)
def test_without_pairs_there_is_no_number(ids: NDArray[np.int64], experts: int) -> None:
    for result in found(ids, experts).values():
        assert np.isnan(result.value)
        assert result.lacks
    assert bundles(ids, experts) == []
    assert co_activation(ids, experts).shape == (experts, experts)
    assert associations(ids, experts)["together"].sum() == 0


def test_every_token_chooses_every_expert() -> None:
    result = found(np.tile(np.arange(4), (50, 1)), 4)
    assert result["co_activation_max"].value == 1
    assert result["co_activation_lift_max"].value == 1
    assert result["co_activation_excess"].value == pytest.approx(0, abs=1e-12)
    assert all(x.beyond == "" for x in result.values())


def test_too_few_tokens_are_said_so(tmp_path: Path) -> None:
    known = layer_of(
        Spec(layers=1, steps=1, sequences=1, length=8, experts=16), tmp_path / "run", "coactivation"
    )
    result = measure(METRICS["co_activation_max"], known)
    assert result.lacks == "no two experts were chosen together, or none by 30 tokens"
