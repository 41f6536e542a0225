"""Every stored question against a plain loop over the rows that were written."""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.traces import Written, layer_info, meta, segment, stream, write_run

from moe_lens.queries.session import Trace, open_trace
from moe_lens.trace.meta import write_meta

EXPERTS, ZERO, LAYERS = 6, 2, 2
PHASES, TAGS = ("train", "eval"), ("code", "prose")

relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

small = st.integers(0, 5)


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """A row of `load` that keeps the invariants."""
    processed, dropped, rerouted = draw(small), draw(small), draw(small)
    return {
        "step": draw(st.integers(0, 3)),
        "phase": draw(st.sampled_from(PHASES)),
        "layer": draw(st.integers(0, LAYERS - 1)),
        "tag": draw(st.sampled_from(TAGS)),
        "expert": draw(st.integers(0, EXPERTS + ZERO - 1)),
        "routed": processed + dropped + rerouted,
        "processed": processed,
        "overflowed": dropped + rerouted,
        "dropped": dropped,
        "rerouted_in": draw(small),
        "padding": draw(small),
        "prob_sum": draw(st.sampled_from([None, 0.25, 1.5])),
        "weight_sum": draw(st.sampled_from([None, 0.5])),
    }


narrowed = st.fixed_dictionaries(
    {},
    optional={
        "first_step": st.integers(0, 3),
        "last_step": st.integers(0, 3),
        "phase": st.sampled_from(PHASES),
    },
)


def routers(draw_tokens: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "phase": phase, "layer": layer, "tag": tag,
         "tokens": draw_tokens * (step + 1), "unserved_tokens": draw_tokens * (step % 2)}
        for step in range(4) for phase in PHASES for layer in range(LAYERS) for tag in TAGS
    ]  # fmt: skip


def trace_of(folder: Path, **tables: list[dict[str, Any]]) -> Trace:
    """Half of the rows sealed, half in an open stream, over two ranks."""
    infos = [layer_info(i, EXPERTS, zero_experts=ZERO) for i in range(LAYERS)]
    for rank in (0, 1):
        write_meta(folder, meta(rank, world=2, layers=infos))
    for table, rows in tables.items():
        half = len(rows) // 2
        segment(folder, table, rows[:half], rank=0)
        if rows[half:]:
            stream(folder, table, rows[half:], rank=1, batches=2)
    return open_trace(folder)


def kept(rows: list[dict[str, Any]], narrow: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        r
        for r in rows
        if r["step"] >= narrow.get("first_step", -1)
        and r["step"] <= narrow.get("last_step", 99)
        and narrow.get("phase", r["phase"]) == r["phase"]
    ]


def ask(trace: Trace, name: str, narrow: dict[str, Any], *keys: str) -> dict[Any, dict[str, Any]]:
    rows = trace.query(name, **narrow).rows()
    found = {tuple(row[k] for k in keys): row for row in rows}
    assert len(found) == len(rows), "a key came twice"
    return found


def ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def same(got: float | None, expected: float | None) -> bool:
    if got is None or expected is None:
        return got is expected
    return got == pytest.approx(expected, rel=1e-9)


@relaxed
@given(load=st.lists(choices(), max_size=30), narrow=narrowed)
def test_expert_load(load: list[dict[str, Any]], narrow: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, trace_of(Path(folder), load=load) as trace:
        got = ask(trace, "expert_load", narrow, "layer", "expert")
        quick = ask(trace, "load_map", narrow, "layer", "expert")
    assert quick == {k: {c: row[c] for c in quick[k]} for k, row in got.items()}
    assert sorted(got) == [(la, e) for la in range(LAYERS) for e in range(EXPERTS)]
    rows = kept(load, narrow)
    for (layer, expert), row in got.items():
        of_layer = [r for r in rows if r["layer"] == layer and r["expert"] < EXPERTS]
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
        assert same(row["ratio"], None if share is None else share * EXPERTS)


@relaxed
@given(load=st.lists(choices(), max_size=40), tokens=st.integers(0, 40), narrow=narrowed)
def test_layer_balance(load: list[dict[str, Any]], tokens: int, narrow: dict[str, Any]) -> None:
    layers = [
        {"step": s, "phase": p, "layer": la, "tokens": tokens}
        for s in range(4) for p in PHASES for la in range(LAYERS)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with trace_of(Path(folder), load=load, layers=layers) as trace:
            got = ask(trace, "layer_balance", narrow, "layer")
    assert sorted(got) == [(layer,) for layer in range(LAYERS)]
    for (layer,), row in got.items():
        n = [0] * EXPERTS
        for r in kept(load, narrow):
            if r["layer"] == layer and r["expert"] < EXPERTS:
                n[r["expert"]] += r["routed"]
        routed = sum(n)
        here = sum(r["tokens"] for r in kept(layers, narrow) if r["layer"] == layer)
        assert (row["experts"], row["tokens"], row["assignments"]) == (EXPERTS, here, routed)
        if routed == 0:
            assert row["max_over_mean"] is None
            assert row["dead_experts"] is None
            continue
        entropy = -sum(x / routed * math.log(x / routed) for x in n if x)
        assert same(row["max_over_mean"], max(n) * EXPERTS / routed)
        assert row["load_entropy"] == pytest.approx(entropy, abs=1e-12)
        assert row["load_entropy_norm"] == pytest.approx(entropy / math.log(EXPERTS), abs=1e-12)
        assert same(row["effective_experts"], math.exp(entropy))
        if here == 0:
            assert row["dead_experts"] is None
            continue
        chance = routed / here / EXPERTS
        if chance >= 1:
            needed, floor = 1, 1.0
        else:
            needed = math.ceil(math.log(EXPERTS / 1e-3) / -math.log(1 - chance))
            mean = routed / EXPERTS
            floor = 1 + math.sqrt(2 * math.log(EXPERTS) * (1 - chance) / mean)
        assert row["tokens_needed"] == needed
        assert same(row["max_over_mean_floor"], floor)
        dead = sum(x == 0 for x in n)
        dormant = sum(10 * EXPERTS * x < routed for x in n)
        enough = here >= needed
        assert row["dead_experts"] == (dead if enough else None)
        assert row["dormant_experts"] == (dormant if enough else None)


@relaxed
@given(
    load=st.lists(choices(), max_size=30),
    tokens=st.integers(0, 9),
    by_tag=st.booleans(),
    narrow=narrowed,
)
def test_dropped_tokens(
    load: list[dict[str, Any]], tokens: int, by_tag: bool, narrow: dict[str, Any]
) -> None:
    seen = routers(tokens)
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


NARROW = [{}, {"phase": "train"}, {"first_step": 1, "last_step": 2}, {"phase": "nothing"}]


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
    for r in kept(written.rows["load"], narrow):
        if r["expert"] < 8:
            n[r["tag"], r["layer"], r["expert"]] += int(r["routed"])
    expected = []
    for tag in ("code", "prose"):
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
