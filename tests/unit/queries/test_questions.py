"""Every stored question against a plain loop over the rows that were written."""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.asking import (
    EXPERTS,
    ask,
    choices,
    confidences,
    fitting,
    kept,
    layers_of,
    narrowed,
    ratio,
    relaxed,
    routed_tokens,
    same,
    trace_of,
)
from support.traces import Rows, Written, write_run

from moe_lens.queries.session import Trace, open_trace


@relaxed
@given(load=st.lists(choices(), max_size=30), narrow=narrowed)
def test_expert_load(load: list[dict[str, Any]], narrow: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, trace_of(Path(folder), load=load) as trace:
        got = ask(trace, "expert_load", narrow, "layer", "expert")
        quick = ask(trace, "load_map", narrow, "layer", "expert")
    assert quick == {k: {c: row[c] for c in quick[k]} for k, row in got.items()}
    assert list(got) == [(la, e) for la in layers_of(narrow) for e in range(EXPERTS[la])]
    rows = kept(load, narrow)
    for (layer, expert), row in got.items():
        of_layer = [r for r in rows if r["layer"] == layer and r["expert"] < EXPERTS[layer]]
        mine = [r for r in of_layer if r["expert"] == expert]
        for column in (
            "routed", "processed", "overflowed", "dropped", "rerouted_in", "padding",
        ):  # fmt: skip
            assert row[column] == sum(r[column] for r in mine)
        for column in ("prob_sum", "weight_sum"):
            there = [r[column] for r in mine if r[column] is not None]
            assert same(row[column], sum(there) if there else None)
        everything = sum(r["routed"] for r in of_layer)
        share = ratio(row["routed"], everything)
        assert same(row["share"], share)
        assert same(row["ratio"], None if share is None else share * EXPERTS[layer])


@relaxed
@given(
    load=st.lists(choices(), max_size=40),
    tokens=st.lists(routed_tokens(), max_size=20),
    narrow=narrowed,
)
def test_layer_balance(load: Rows, tokens: Rows, narrow: dict[str, Any]) -> None:
    layers = [{k: v for k, v in r.items() if k != "tag"} for r in tokens]
    with tempfile.TemporaryDirectory() as folder:
        with trace_of(Path(folder), load=load, layers=layers, routers=tokens) as trace:
            got = ask(trace, "layer_balance", narrow, "layer")
    assert list(got) == [(layer,) for layer in layers_of(narrow)]
    for (layer,), row in got.items():
        experts = EXPERTS[layer]
        n = [0] * experts
        for r in kept(load, narrow):
            if r["layer"] == layer and r["expert"] < experts:
                n[r["expert"]] += r["routed"]
        routed = sum(n)
        here = sum(r["tokens"] for r in kept(tokens, narrow) if r["layer"] == layer)
        assert (row["experts"], row["tokens"], row["assignments"]) == (experts, here, routed)
        if routed == 0:
            assert row["max_over_mean"] is None
            assert row["dead_experts"] is None
            continue
        entropy = -sum(x / routed * math.log(x / routed) for x in n if x)
        norm = entropy / math.log(experts) if experts > 1 else None
        assert same(row["max_over_mean"], max(n) * experts / routed)
        assert same(row["load_entropy"], entropy)
        assert same(row["load_entropy_norm"], norm)
        assert same(row["effective_experts"], math.exp(entropy))
        if here == 0:
            assert row["dead_experts"] is None
            continue
        chance = routed / here / experts
        if chance >= 1:
            needed, floor = 1, 1.0
        else:
            needed = math.ceil(math.log(experts / 1e-3) / -math.log(1 - chance))
            mean = routed / experts
            floor = 1 + math.sqrt(2 * math.log(experts) * (1 - chance) / mean)
        assert row["tokens_needed"] == needed
        assert same(row["max_over_mean_floor"], floor)
        dead = sum(x == 0 for x in n)
        dormant = sum(10 * experts * x < routed for x in n)
        enough = here >= needed
        assert row["dead_experts"] == (dead if enough else None)
        assert row["dormant_experts"] == (dormant if enough else None)


@relaxed
@given(
    load=st.lists(choices(), max_size=30),
    seen=st.lists(confidences(), max_size=15),
    by_tag=st.booleans(),
    narrow=narrowed,
)
def test_dropped_tokens(load: Rows, seen: Rows, by_tag: bool, narrow: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with trace_of(Path(folder), load=load, routers=seen) as trace:
            got = ask(trace, "dropped_tokens", {**narrow, "by_tag": by_tag}, "layer", "tag")
    expected: dict[Any, Counter[str]] = defaultdict(Counter)
    for r in kept(load, narrow):
        expected[r["layer"], r["tag"] if by_tag else "all"].update(
            {k: r[k] for k in ("routed", "processed", "overflowed", "dropped", "rerouted_in")}
        )
    for r in kept(seen, narrow):
        expected[r["layer"], r["tag"] if by_tag else "all"].update(
            {k: r[k] for k in ("tokens", "unserved_tokens")}
        )
    assert sorted(got) == sorted(expected)
    for key, row in got.items():
        e = expected[key]
        for column in (
            "tokens", "routed", "processed", "overflowed", "dropped", "rerouted_in",
            "unserved_tokens",
        ):  # fmt: skip
            assert row[column] == e[column]
        assert same(row["overflow_rate"], ratio(e["overflowed"], e["routed"]))
        assert same(row["dropped_rate"], ratio(e["dropped"], e["routed"]))
        assert same(row["unserved_rate"], ratio(e["unserved_tokens"], e["tokens"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, Trace]:
    written = write_run(
        tmp_path_factory.mktemp("run"), ranks=(0, 1), world=2, steps=5, tokens=50, zero_experts=2,
        open_tables=("load", "routers", "slices", "steps"),
    )  # fmt: skip
    return written, open_trace(written.path)


NARROW = [
    {},
    {"phase": "train"},
    {"first_step": 1, "last_step": 2},
    {"phase": "nothing"},
    {"tag": "prose", "rank": 1},
    {"tag": "it's not there"},
    {"first_layer": 1},
    {"last_layer": 0, "rank": 0},
]


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("by_tag", [True, False])
def test_router_confidence(run: tuple[Written, Trace], narrow: dict, by_tag: bool) -> None:
    written, trace = run
    got = ask(trace, "router_confidence", {**narrow, "by_tag": by_tag}, "layer", "tag")
    groups = defaultdict(list)
    for r in kept(written.rows["routers"], narrow):
        groups[r["layer"], r["tag"] if by_tag else "all"].append(r)
    assert sorted(got) == sorted(groups)
    for key, rows in groups.items():
        tokens = sum(r["tokens"] for r in rows)
        assert got[key]["tokens"] == tokens
        entropy = sum(r["entropy_sum"] for r in rows) / tokens
        assert same(got[key]["entropy"], entropy)
        assert same(got[key]["entropy_norm"], entropy / math.log(8 + 2))
        assert same(got[key]["margin"], 0.125)
        assert same(got[key]["top1_prob"], 0.5)
        assert same(got[key]["zloss"], 4.0)


def test_router_confidence_leaves_out_what_has_no_number(tmp_path: Path) -> None:
    base = {"layer": 0, "tag": "a", "tokens": 10}
    rows = [
        {**base, "step": 0, "nonfinite_tokens": 4, "entropy_sum": 3.0},
        {**base, "step": 1, "entropy_sum": None},
    ]
    with trace_of(tmp_path, routers=rows) as trace:
        (row,) = trace.query("router_confidence").rows()
    assert row["entropy"] == 0.5
    assert row["nonfinite_tokens"] == 4
    assert row["margin"] is None


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("by", ["lift", "share"])
def test_hottest_experts(run: tuple[Written, Trace], narrow: dict, by: str) -> None:
    written, trace = run
    got = trace.query("hottest_experts", **narrow, by=by, top=3, min_routed=10).rows()
    n: Counter[Any] = Counter()
    of_all_tags = {k: v for k, v in narrow.items() if k != "tag"}
    for r in kept(written.rows["load"], of_all_tags):
        if r["expert"] < 8:
            n[r["tag"], r["layer"], r["expert"]] += int(r["routed"])
    expected = []
    for tag in ("code", "prose"):
        if narrow.get("tag", tag) != tag:
            continue
        found = []
        for (t, layer, expert), routed in n.items():
            if t == tag and routed >= 10:
                share = routed / sum(m for (a, b, _), m in n.items() if (a, b) == (tag, layer))
                overall = sum(m for (_, b, c), m in n.items() if (b, c) == (layer, expert))
                overall /= sum(m for (_, b, _), m in n.items() if b == layer)
                rank_by = share if by == "share" else share / overall
                found.append((-round(rank_by, 12), layer, expert, tag, routed))
        expected += sorted(found)[:3]
    assert [(r["tag"], r["layer"], r["expert"], r["routed"]) for r in got] == [
        (tag, layer, expert, routed) for _, layer, expert, tag, routed in expected
    ]
    for r, e in zip(got, expected, strict=True):
        assert r[by] == pytest.approx(-e[0])


@pytest.mark.parametrize("narrow", NARROW)
def test_loss_by_tag(run: tuple[Written, Trace], narrow: dict) -> None:
    written, trace = run
    narrow = fitting("loss_by_tag", narrow)
    got = ask(trace, "loss_by_tag", narrow, "phase", "tag")
    groups = defaultdict(list)
    for r in kept(written.rows["slices"], narrow):
        groups[r["phase"], r["tag"]].append(r)
    assert sorted(got) == sorted(groups)
    for key, rows in groups.items():
        assert got[key]["tokens"] == sum(r["tokens"] for r in rows)
        assert got[key]["sequences"] == sum(r["sequences"] for r in rows)
        loss = sum(r["loss_sum"] for r in rows) / sum(r["loss_tokens"] for r in rows)
        assert same(got[key]["loss"], loss)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("every", [1, 2])
def test_load_over_time(run: tuple[Written, Trace], narrow: dict, every: int) -> None:
    written, trace = run
    got = ask(trace, "load_over_time", {**narrow, "every": every}, "step", "layer")
    groups: dict[Any, dict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for r in kept(written.rows["load"], narrow):
        if r["expert"] < 8:
            for column in ("routed", "overflowed", "dropped"):
                group = groups[r["step"] // every * every, r["layer"]]
                group[column][r["expert"]] += int(r[column])
    assert sorted(got) == sorted(groups)
    for key, n in groups.items():
        routed = sum(n["routed"].values())
        assert got[key]["assignments"] == routed
        assert same(got[key]["max_over_mean"], max(n["routed"].values()) * 8 / routed)
        assert same(got[key]["overflow_rate"], sum(n["overflowed"].values()) / routed)
        assert same(got[key]["dropped_rate"], sum(n["dropped"].values()) / routed)


@pytest.mark.parametrize("narrow", NARROW)
def test_capture_health(run: tuple[Written, Trace], narrow: dict) -> None:
    written, trace = run
    narrow = fitting("capture_health", narrow)
    got = ask(trace, "capture_health", narrow, "phase")
    rows = kept(written.rows["steps"], narrow)
    assert sorted(got) == sorted({(r["phase"],) for r in rows})
    for (phase,), row in got.items():
        mine = [r for r in rows if r["phase"] == phase]
        assert row["forwards"] == len(mine)
        assert row["steps"] == len({r["step"] for r in mine})
        for column in ("tokens", "padding_tokens", "sampled", "fires_expected", "fires_seen"):
            assert row[column] == sum(r[column] for r in mine)
        assert row["lost_rows"] == row["breaches"] == 0


def test_run_totals(run: tuple[Written, Trace]) -> None:
    written, trace = run
    (row,) = trace.query("run_totals").rows()
    steps = written.rows["steps"]
    assert row["steps"] == 5
    assert row["forwards"] == len(steps) == 10
    assert (row["first_step"], row["last_step"]) == (0, 4)
    assert row["tokens"] == sum(r["tokens"] for r in steps)
    assert row["token_rows"] == len(written.rows["tokens"])
    assert set(row["phases"].split("\n")) == {"train", "eval"}
