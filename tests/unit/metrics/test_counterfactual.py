"""Tables of counterfactual rows against plain loops over the rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.metrics.counterfactual import (
    expert_importance,
    route_changes,
    route_regret,
    token_regret,
)

LAYERS = [{"layer": n, "experts": 4, "zero_experts": 0, "top_k": 2} for n in (0, 3)]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Two layers, three sequences of five tokens, four experts, up to four routes of a token."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for layer in (0, 3):
        for sequence in range(3):
            for position in range(5):
                own = set(rng.permutation(4)[:2].tolist())
                key = {
                    "layer": layer,
                    "sequence": sequence,
                    "position": position,
                    "tag": "ab"[sequence % 2],
                    "base_loss": float(rng.normal(3)),
                    "margin": float(rng.random()),
                    "entropy": float(rng.random()) if layer == 0 else math.nan,
                }
                changes = [("knock_out", e, e in own) for e in range(4)]
                changes += [("force_in", e, e not in own) for e in range(4)]
                changes += [("runner_up", 0, True), ("top_k", 1, True), ("top_k", 2, False)]
                changes += [("other_route", a, True) for a in range(1 + position % 4)]
                for intervention, number, affected in changes:
                    loss = key["base_loss"] + (float(rng.normal()) if affected else 0.0)
                    found.append(
                        key
                        | {"intervention": intervention, "number": number}
                        | {"affected": affected, "loss": loss}
                    )
    return pd.DataFrame(found)


def columns(rows: pd.DataFrame) -> dict[str, Any]:
    shuffled = rows.sample(frac=1, random_state=1)  # their order means nothing
    return {name: shuffled[name].to_numpy() for name in shuffled}


def error_of(pairs: list[tuple[int, float]]) -> float:
    """Standard error of a mean whose sequences are independent, written out."""
    mean = sum(x for _, x in pairs) / len(pairs)
    sums: dict[int, float] = {}
    for sequence, x in pairs:
        sums[sequence] = sums.get(sequence, 0.0) + x - mean
    s = len(sums)
    return math.sqrt(s / (s - 1) * sum(x * x for x in sums.values())) / len(pairs)


def test_importance_is_what_a_loop_over_tokens_says(rows: pd.DataFrame) -> None:
    found = expert_importance(columns(rows), LAYERS).set_index(["layer", "expert"])
    assert len(found) == 8
    for (layer, expert), got in found.iterrows():  # type: ignore[misc]
        mine = [r for r in rows.itertuples() if (r.layer, r.number) == (layer, expert)]
        out = [r for r in mine if r.intervention == "knock_out"]
        used = [r for r in out if r.affected]
        forced = [r for r in mine if r.intervention == "force_in"]
        assert got["load"] == pytest.approx(len(used) / 15)
        assert got["fair"] == 0.5
        for name, part in (("knock_out", out), ("knock_out_used", used), ("force_in", forced)):
            pairs = [(r.sequence, r.loss - r.base_loss) for r in part]
            assert got[name] == pytest.approx(sum(x for _, x in pairs) / len(pairs))
            assert got[f"{name}_error"] == pytest.approx(error_of(pairs))


def test_a_rare_expert_whose_loss_costs_much_is_dormant_but_causal() -> None:
    """And one whose cost is as high in one sequence and below zero in another is noise."""
    made = []
    experts = [(0.6, 0.1), (0.3, 0.1), (0.05, 3.0), (0.05, 0.02), (0.05, 1.5)]
    for expert, (share, cost) in enumerate(experts):
        for token in range(200):
            used = token % 100 < 100 * share
            key = {"layer": 0, "number": expert, "sequence": token // 20, "position": token % 20}
            key |= {"tag": "x", "base_loss": 1.0, "margin": 0.1, "entropy": 0.1}
            noise = 0.001 * ((7 * token) % 3 - 1)
            for kind, hit in (("knock_out", used), ("force_in", not used)):
                size = (cost if kind == "knock_out" else 0.001) + noise
                if expert == 4 and kind == "knock_out":
                    size += 3.0 if token < 100 else -3.0
                made.append(key | {"intervention": kind, "affected": hit, "loss": 1.0 + hit * size})
    found = expert_importance(columns(pd.DataFrame(made)), LAYERS[:1])
    assert found.dormant.tolist() == [False, False, True, True, True]
    assert found.dormant_but_causal.tolist() == [False, False, True, False, False]


def test_an_expert_that_was_only_forced_in_still_has_its_load(rows: pd.DataFrame) -> None:
    forced = rows[rows.intervention == "force_in"]
    both = expert_importance(columns(rows), LAYERS)
    one = expert_importance(columns(forced), LAYERS)
    assert np.allclose(one.load, both.load)
    assert one.knock_out.isna().all()


def test_changes_are_means_over_tokens(rows: pd.DataFrame) -> None:
    found = route_changes(columns(rows)).set_index(["layer", "intervention", "number"])
    assert len(found) == 2 * 3
    for (layer, kind, number), got in found.iterrows():  # type: ignore[misc]
        mine = [
            r
            for r in rows.itertuples()
            if (r.layer, r.intervention, r.number) == (layer, kind, number)
        ]
        costs = [r.loss - r.base_loss for r in mine]
        assert got["tokens"] == 15
        assert got["cost"] == pytest.approx(sum(costs) / 15)
        assert got["worse"] == pytest.approx(sum(c > 0 for c in costs) / 15)
    assert found.loc[(0, "top_k", 2), "cost"] == 0


def test_regret_is_what_a_loop_over_routes_says(rows: pd.DataFrame) -> None:
    found = token_regret(columns(rows))
    assert len(found) == 30
    for got in found.itertuples():
        routes = [
            r.loss
            for r in rows.itertuples()
            if r.intervention == "other_route"
            and (r.layer, r.sequence, r.position) == (got.layer, got.sequence, got.position)
        ]
        assert got.routes == len(routes)
        assert got.regret == pytest.approx(got.loss - min(routes))
        assert got.mean_route == pytest.approx(sum(routes) / len(routes) - got.loss)
        assert got.rank == 1 + sum(x < got.loss for x in routes)
        assert got.beats == pytest.approx(sum(x > got.loss for x in routes) / len(routes))
        others = [min(routes[:i] + routes[i + 1 :], default=math.nan) for i in range(len(routes))]
        drawn = [x - y for x, y in zip(routes, others, strict=True)]
        assert got.random_regret == pytest.approx(sum(drawn) / len(drawn), nan_ok=True)


def test_ties_count_half() -> None:
    key = {"layer": 0, "sequence": 0, "tag": "x", "margin": 0.1, "entropy": 0.1, "position": 0}
    key |= {"intervention": "other_route", "affected": True, "base_loss": 2.0}
    made = [key | {"number": i, "loss": loss} for i, loss in enumerate([2.0, 1.0, 3.0, 2.0])]
    got = token_regret(columns(pd.DataFrame(made))).iloc[0]
    assert (got["rank"], got.beats, got.regret) == (3.0, 0.5, 1.0)


@pytest.mark.parametrize("by", [None, "tag", "margin", "entropy"])
def test_slices_are_parts_of_the_whole(rows: pd.DataFrame, by: Any) -> None:
    tokens = token_regret(columns(rows))
    found = route_regret(columns(rows), by, buckets=3)
    assert found.groupby("layer").tokens.sum().tolist() == [15, 15]
    for got in found.itertuples():
        mine = tokens[tokens.layer == got.layer]
        if by == "tag":
            mine = mine[mine.tag == got.slice]
        elif by and got.slice != "entropy unknown":
            values = np.sort(mine[by])
            third = int(got.slice.split()[1]) - 1
            mine = mine[mine[by].isin(values[5 * third : 5 * third + 5])]
            assert (got.least, got.most) == (mine[by].min(), mine[by].max())
        assert len(mine) == got.tokens
        assert got.regret == pytest.approx(mine.regret.mean())
        assert got.positive == pytest.approx((mine.regret > 0).mean())
        assert got.beats == pytest.approx(mine.beats.mean())
        assert got.middle_rank == pytest.approx(1 + mine.routes.mean() / 2)
    together = route_regret(columns(rows), by, buckets=3, together=True)
    assert together.tokens.sum() == 30
    assert (together.layer == -1).all()


def test_no_rows_are_empty_tables(rows: pd.DataFrame) -> None:
    none = columns(rows.iloc[:0])
    assert expert_importance(none, LAYERS).empty
    assert route_changes(none).empty
    assert route_regret(none).empty
    assert route_regret(none, "margin").empty


def test_a_router_that_draws_is_nowhere_better(rows: pd.DataFrame) -> None:
    """Its own route is one of the drawn: rank in the middle, beats half, regret of a drawn one."""
    rng = np.random.default_rng(5)
    made = []
    for token in range(4000):
        losses = rng.normal(size=9)
        key = {"layer": 0, "sequence": token // 50, "position": token % 50, "tag": "x"}
        key |= {"margin": 0.1, "entropy": 0.1, "intervention": "other_route", "affected": True}
        made += [key | {"number": i, "base_loss": losses[8], "loss": losses[i]} for i in range(8)]
    got = route_regret(columns(pd.DataFrame(made))).iloc[0]
    assert abs(got["rank"] - got.middle_rank) < 0.15
    assert abs(got.beats - 0.5) < 3 * got.beats_error < 0.05
    assert abs(got.regret - got.random_regret) < 0.15
    assert got.regret > 1  # and still: the least of eight flatters
