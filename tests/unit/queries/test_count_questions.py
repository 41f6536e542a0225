"""The questions that read counts over time, of one expert and by tag, against a plain loop."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.asking import (
    EXPERTS,
    PHASES,
    RAN,
    RANKS,
    STEPS,
    TAGS,
    ZERO,
    ask,
    choices,
    confidences,
    fitting,
    kept,
    keys,
    narrowed,
    ratio,
    relaxed,
    routed_tokens,
    same,
    small,
    trace_of,
)
from support.traces import Rows

buckets = st.integers(1, 3)
of_layer, of_expert = st.integers(0, RAN), st.integers(-1, 8)


def answer(name: str, narrow: dict[str, Any], tables: dict[str, Rows], *key: str) -> dict[Any, Any]:
    """The question asked of a trace of these rows, with the filters that it has."""
    more = {k: v for k, v in narrow.items() if k in ("every", "by_tag", "layer", "expert", "top")}
    with tempfile.TemporaryDirectory() as folder, trace_of(Path(folder), **tables) as trace:
        return ask(trace, name, fitting(name, narrow) | more, *key)


def grouped(rows: Rows, *names: str, every: int = 1) -> dict[Any, Rows]:
    """Rows by these columns, steps in buckets."""
    groups: dict[Any, Rows] = defaultdict(list)
    for r in rows:
        at = {**r, "step": r["step"] // every * every}
        groups[tuple(at[k] for k in names)].append(r)
    return groups


def total(rows: Rows, column: str) -> Any:
    return sum(r[column] for r in rows)


@st.composite
def forwards(draw: st.DrawFn) -> Rows:
    """Rows of `steps`: each rank, step and forward once, of one phase a step."""
    where = st.tuples(
        st.integers(0, RANKS - 1), st.integers(0, STEPS - 1), st.integers(0, 2),
        st.sampled_from(PHASES),
    )  # fmt: skip
    return [
        {
            "rank": rank, "step": step, "forward": forward, "phase": phase,
            "tokens": draw(small), "lost_rows": draw(small), "breaches": draw(small),
            "host_ns": draw(st.sampled_from([0, 1500, 2_000_000, 3_000_001])),
            "device_ns": draw(st.sampled_from([None, 700, 5_000_000])),
        }
        for rank, step, forward, phase in draw(
            st.lists(where, max_size=15, unique_by=lambda w: w[:3])
        )
    ]  # fmt: skip


@relaxed
@given(rows=forwards(), every=buckets, narrow=narrowed)
def test_forwards_over_time(rows: Rows, every: int, narrow: dict[str, Any]) -> None:
    got = answer("forwards_over_time", {**narrow, "every": every}, {"steps": rows}, "step", "phase")
    narrow = fitting("forwards_over_time", narrow)
    expected = grouped(kept(rows, narrow), "step", "phase", every=every)
    assert list(got) == sorted(expected)
    for key, mine in expected.items():
        row, seconds = got[key], total(mine, "host_ns") / 1e9
        assert row["forwards"] == len(mine)
        for column in ("tokens", "lost_rows", "breaches"):
            assert row[column] == total(mine, column)
        assert same(row["host_ms"], seconds * 1e3 / len(mine))
        assert same(row["tokens_per_second"], ratio(total(mine, "tokens"), seconds))


@relaxed
@given(rows=forwards(), top=st.integers(1, 6), narrow=narrowed)
def test_slowest_forwards(rows: Rows, top: int, narrow: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, trace_of(Path(folder), steps=rows) as trace:
        narrow = fitting("slowest_forwards", narrow)
        got = trace.query("slowest_forwards", **narrow, top=top).rows()
    found = []
    for of_phase in grouped(kept(rows, narrow), "phase").values():
        for clock in ("host", "device"):
            timed = [r for r in of_phase if (r["device_ns"] is None) == (clock == "host")]
            for r in timed:
                middle = statistics.median(x[f"{clock}_ns"] for x in timed)
                found.append((ratio(r[f"{clock}_ns"], middle), r[f"{clock}_ns"], r))
    found.sort(key=lambda x: (-(x[0] or 0), -x[1], x[2]["rank"], x[2]["step"], x[2]["forward"]))
    assert len(got) == min(top, len(found))
    for row, (times, ns, r) in zip(got, found, strict=False):
        for column in ("rank", "step", "forward", "phase", "tokens"):
            assert row[column] == r[column]
        assert same(row["host_ms"], r["host_ns"] / 1e6)
        assert same(row["device_ms"], None if r["device_ns"] is None else r["device_ns"] / 1e6)
        assert same(row["us_per_token"], ratio(ns / 1e3, r["tokens"]))
        assert same(row["times_median"], times)


@relaxed
@given(
    rows=st.lists(confidences(), max_size=25), every=buckets, by_tag=st.booleans(), narrow=narrowed
)
def test_router_over_time(rows: Rows, every: int, by_tag: bool, narrow: dict[str, Any]) -> None:
    asked = {**narrow, "every": every, "by_tag": by_tag}
    got = answer("router_over_time", asked, {"routers": rows}, "step", "layer", "tag")
    rows = [{**r, "tag": r["tag"] if by_tag else "all"} for r in kept(rows, narrow)]
    expected = grouped(rows, "step", "layer", "tag", every=every)
    assert list(got) == sorted(expected)
    for (step, layer, tag), mine in expected.items():
        row = got[step, layer, tag]
        assert row["tokens"] == total(mine, "tokens") - total(mine, "nonfinite_tokens")
        for column in ("entropy", "margin", "top1_prob", "zloss"):
            known = [r for r in mine if r[f"{column}_sum"] is not None]
            tokens = total(known, "tokens") - total(known, "nonfinite_tokens")
            assert same(row[column], ratio(total(known, f"{column}_sum"), tokens))
        experts = EXPERTS[layer] + ZERO[layer]
        known_norm = row["entropy"] is not None and experts > 1
        assert same(row["entropy_norm"], row["entropy"] / math.log(experts) if known_norm else None)


@relaxed
@given(
    load=st.lists(choices(), max_size=30),
    layer=of_layer, expert=of_expert, every=buckets, narrow=narrowed,
)  # fmt: skip
def test_expert_over_time(
    load: Rows, layer: int, expert: int, every: int, narrow: dict[str, Any]
) -> None:
    asked = {**narrow, "layer": layer, "expert": expert, "every": every}
    got = answer("expert_over_time", asked, {"load": load}, "step")
    narrow = fitting("expert_over_time", narrow)
    rows = [r for r in kept(load, narrow) if r["layer"] == layer and r["expert"] < EXPERTS[layer]]
    expected = {
        key: mine
        for key, mine in grouped(rows, "step", every=every).items()
        if total(mine, "routed") and 0 <= expert < EXPERTS[layer]
    }
    assert list(got) == sorted(expected)
    for key, of_all in expected.items():
        row, mine = got[key], [r for r in of_all if r["expert"] == expert]
        for column in ("routed", "overflowed", "dropped"):
            assert row[column] == total(mine, column)
        share = total(mine, "routed") / total(of_all, "routed")
        assert same(row["share"], share)
        assert same(row["ratio"], share * EXPERTS[layer])


@relaxed
@given(load=st.lists(choices(), max_size=30), layer=of_layer, expert=of_expert, narrow=narrowed)
def test_expert_tags(load: Rows, layer: int, expert: int, narrow: dict[str, Any]) -> None:
    got = answer("expert_tags", {**narrow, "layer": layer, "expert": expert}, {"load": load}, "tag")
    of_all_tags = {k: v for k, v in fitting("expert_tags", narrow).items() if k != "tag"}
    rows = [
        r for r in kept(load, of_all_tags) if r["layer"] == layer and r["expert"] < EXPERTS[layer]
    ]
    shown = [narrow["tag"]] if "tag" in narrow else sorted(TAGS)
    by_tag = {t: total([r for r in rows if r["tag"] == t], "routed") for t in shown}
    real = 0 <= expert < EXPERTS[layer]
    assert list(got) == [(t,) for t in shown if by_tag[t] and real]
    for (tag,), row in got.items():
        mine = [r for r in rows if r["expert"] == expert]
        routed = total([r for r in mine if r["tag"] == tag], "routed")
        share = ratio(routed, total(mine, "routed"))
        overall = by_tag[tag] / total(rows, "routed")
        assert row["routed"] == routed
        assert same(row["share"], share)
        assert same(row["overall_share"], overall)
        assert same(row["lift"], None if share is None else share / overall)


@relaxed
@given(
    load=st.lists(choices(), max_size=40),
    tokens=st.lists(routed_tokens(), max_size=20),
    narrow=narrowed,
)
def test_dead_experts(load: Rows, tokens: Rows, narrow: dict[str, Any]) -> None:
    layers = [{k: v for k, v in r.items() if k != "tag"} for r in tokens]
    tables = {"load": load, "layers": layers, "routers": tokens}
    got = answer("dead_experts", narrow, tables, "layer", "expert")
    expected: dict[Any, dict[str, Any]] = {}
    so_far = kept(load, {k: v for k, v in narrow.items() if k != "first_step"})
    for layer, experts in enumerate(EXPERTS):
        here = [r for r in kept(load, narrow) if r["layer"] == layer and r["expert"] < experts]
        routed = total(here, "routed")
        seen = total([r for r in kept(tokens, narrow) if r["layer"] == layer], "tokens")
        if not routed or not seen:
            continue
        chance = routed / seen / experts
        needed = 1
        if chance < 1:
            needed = math.ceil(math.log(experts / 1e-3) / -math.log(1 - chance))
        for expert in range(experts):
            n = total([r for r in here if r["expert"] == expert], "routed")
            if seen < needed or n * experts * 10 >= routed:
                continue
            steps = [
                r["step"] for r in so_far
                if (r["layer"], r["expert"]) == (layer, expert) and r["routed"]
            ]  # fmt: skip
            expected[layer, expert] = {
                "run": "",
                "layer": layer,
                "expert": expert,
                "state": "dormant" if n else "dead",
                "routed": n,
                "ratio": pytest.approx(n * experts / routed),
                "tokens": seen,
                "tokens_needed": needed,
                "last_step": max(steps) if steps else None,
            }
    assert {k: {**row, "run": ""} for k, row in got.items()} == expected


@st.composite
def exchanges(draw: st.DrawFn) -> dict[str, Any]:
    """A row of `layers` in which an all-to-all was seen, or not."""
    ns = st.sampled_from([None, 0, 1500, 4_000_000])
    return {
        **draw(keys("layer")), "forwards": draw(st.integers(1, 4)),
        "dispatch_ns": draw(ns), "combine_ns": draw(ns),
    }  # fmt: skip


@relaxed
@given(rows=st.lists(exchanges(), max_size=20), every=buckets, narrow=narrowed)
def test_all_to_all(rows: Rows, every: int, narrow: dict[str, Any]) -> None:
    got = answer("all_to_all", {**narrow, "every": every}, {"layers": rows}, "step", "layer")
    narrow = fitting("all_to_all", narrow)
    seen = [
        r for r in kept(rows, narrow)
        if r["dispatch_ns"] is not None or r["combine_ns"] is not None
    ]  # fmt: skip
    expected = grouped(seen, "step", "layer", every=every)
    assert list(got) == sorted(expected)
    for key, mine in expected.items():
        assert got[key]["forwards"] == total(mine, "forwards")
        for name in ("dispatch", "combine"):
            known = [r for r in mine if r[f"{name}_ns"] is not None]
            mean = ratio(total(known, f"{name}_ns") / 1e6, total(known, "forwards"))
            assert same(got[key][f"{name}_ms"], mean)


@st.composite
def losses(draw: st.DrawFn) -> dict[str, Any]:
    """A row of `slices`, with a loss or without."""
    given = draw(st.integers(0, 3))
    return {
        **draw(keys("tag")), "tokens": draw(small), "loss_tokens": given,
        "loss_sum": draw(st.sampled_from([0.0, 1.5, 7.25])) if given else None,
    }  # fmt: skip


@relaxed
@given(
    load=st.lists(choices(), max_size=15),
    routers=st.lists(confidences(), max_size=15),
    slices=st.lists(losses(), max_size=10),
    narrow=narrowed,
)
def test_quality_by_tag(load: Rows, routers: Rows, slices: Rows, narrow: dict[str, Any]) -> None:
    tables = {"load": load, "routers": routers, "slices": slices}
    got = answer("quality_by_tag", narrow, tables, "tag")
    load, routers, slices = (kept(rows, narrow) for rows in (load, routers, slices))
    assert list(got) == sorted({(r["tag"],) for r in load + routers + slices})
    for (tag,), row in got.items():
        mine = [r for r in slices if r["tag"] == tag]
        routed = [r for r in load if r["tag"] == tag]
        seen = [r for r in routers if r["tag"] == tag]
        assert row["tokens"] == total(mine, "tokens")
        assert row["loss_tokens"] == total(mine, "loss_tokens")
        loss = sum(r["loss_sum"] or 0 for r in mine)
        assert same(row["loss"], ratio(loss, row["loss_tokens"]))
        assert same(row["dropped_rate"], ratio(total(routed, "dropped"), total(routed, "routed")))
        unserved = ratio(total(seen, "unserved_tokens"), total(seen, "tokens"))
        assert same(row["unserved_rate"], unserved)
        undecided = tokens = 0.0
        for r in seen:
            experts = EXPERTS[r["layer"]] + ZERO[r["layer"]]
            if r["entropy_sum"] is not None and experts > 1:
                undecided += r["entropy_sum"] / math.log(experts)
                tokens += r["tokens"] - r["nonfinite_tokens"]
        assert same(row["entropy_norm"], ratio(undecided, tokens))


def test_a_dead_expert_says_since_when(tmp_path: Path) -> None:
    """Expert 5 was never chosen, 4 not after step 1, 3 rarely; the layer of one expert is alive."""
    load = [
        {"step": step, "layer": 0, "expert": e, "tag": "code", "routed": n}
        for step in range(STEPS)
        for e, n in enumerate([100, 100, 100, 1, 90 if step < 2 else 0])
    ] + [{"step": 0, "layer": 2, "expert": 0, "tag": "code", "routed": 100}]
    layers = [{"step": step, "layer": 0, "tokens": 200} for step in range(STEPS)]
    layers += [{"step": 0, "layer": 2, "tokens": 100}]
    with trace_of(tmp_path, load=load, layers=layers) as trace:
        whole = trace.query("dead_experts").rows()
        late = trace.query("dead_experts", first_step=2).rows()
        early = trace.query("dead_experts", last_step=0, first_layer=0).rows()
    shown = ("layer", "expert", "state", "routed", "last_step", "tokens")
    assert [tuple(r[c] for c in shown) for r in whole] == [
        (0, 3, "dormant", 4, 3, 800), (0, 5, "dead", 0, None, 800),
    ]  # fmt: skip
    assert [tuple(r[c] for c in shown) for r in late] == [
        (0, 3, "dormant", 2, 3, 400), (0, 4, "dead", 0, 1, 400), (0, 5, "dead", 0, None, 400),
    ]  # fmt: skip
    assert [(r["expert"], r["last_step"]) for r in early] == [(3, 0), (5, None)]
