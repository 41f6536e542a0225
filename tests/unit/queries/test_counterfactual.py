"""The view `counterfactual` and its questions, against the metrics and against plain loops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.counterfactuals import Rows, columns, made_up, said, write
from support.traces import layer_info, meta

from moe_lens.errors import QueryError, TraceError
from moe_lens.metrics.counterfactual import (
    Slice,
    expert_importance,
    route_changes,
    route_regret,
)
from moe_lens.queries import counterfactual
from moe_lens.queries.locked import ask
from moe_lens.queries.session import open_trace
from moe_lens.queries.views import literal
from moe_lens.trace.meta import write_meta

LAYERS = [{"layer": n, "experts": 8, "zero_experts": 0, "top_k": 2} for n in (0, 3)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "it's [a] run"
    write_meta(path, meta(0, layers=[layer_info(n, 8, top_k=2) for n in (0, 3)]))
    return path


def matches(got: Rows, expected: pd.DataFrame, *keys: str) -> None:
    """All columns of the metric, row by row; the question may have more."""
    assert len(got) == len(expected)
    by_key = {tuple(r[k] for k in keys): r for r in got}
    for row in expected.to_dict("records"):
        mine = by_key[tuple(row[k] for k in keys)]
        for name, value in row.items():
            if isinstance(value, float):
                found = math.nan if mine[name] is None else mine[name]
                assert found == pytest.approx(value, nan_ok=True, rel=1e-9, abs=1e-12), name
            else:
                assert mine[name] == value, name


def narrowed(rows: Rows, narrow: Mapping[str, Any]) -> Rows:
    return [
        r
        for r in rows
        if narrow.get("tag") in (None, r["tag"])
        and narrow.get("first_layer", 0) <= r["layer"] <= narrow.get("last_layer", 9)
    ]


@pytest.mark.parametrize(
    "narrow", [{}, {"tag": "it's <b>prose"}, {"first_layer": 1}, {"last_layer": 2, "tag": "code"}]
)
def test_the_questions_say_what_the_metrics_say(run: Path, narrow: dict[str, Any]) -> None:
    rows = made_up(1)
    write(run, "mine", rows, said(rows))
    write(run, "other", made_up(2), said(rows))
    left = columns(narrowed(rows, narrow))
    with open_trace(run) as trace:
        found = trace.query("expert_importance", result="mine", **narrow).rows()
        matches(found, expert_importance(left, LAYERS), "layer", "expert")
        found = trace.query("route_changes", result="mine", **narrow).rows()
        matches(found, route_changes(left), "layer", "intervention", "number")
        assert {r["own"] for r in found} == {2}
        slices: dict[str, Slice | None]
        slices = {"all": None, "tag": "tag", "margin": "margin", "entropy": "entropy"}
        for by, sliced in slices.items():
            for together in (False, True):
                found = trace.query(
                    "route_regret", result="mine", by=by, together=together, **narrow
                ).rows()
                expected = route_regret(left, sliced, together=together)
                matches(found, expected, "layer", "slice")


def test_dormant_experts_are_judged_within_their_layer_and_result(run: Path) -> None:
    rows: Rows = []
    for expert, (share, cost) in enumerate([(0.6, 0.1), (0.6, 0.1), (0.05, 3.0), (0.05, 0.02)]):
        for token in range(200):
            used = token % 100 < 100 * share
            key: dict[str, Any] = {
                "layer": 0,
                "number": expert,
                "sequence": token // 20,
                "position": token % 20,
            }
            key |= {"tag": "x", "base_loss": 1.0, "margin": 0.1, "entropy": 0.1, "expert_ids": None}
            noise = 0.001 * ((7 * token) % 3 - 1)
            for kind, hit in (("knock_out", used), ("force_in", not used)):
                size = (cost if kind == "knock_out" else 0.001) + noise
                rows.append(key | {"intervention": kind, "affected": hit, "loss": 1.0 + hit * size})
    write(run, "planted", rows, said(rows))
    write(run, "noise", made_up(3), said(rows))
    with open_trace(run) as trace:
        found = trace.query("expert_importance", result="planted").rows()
        both = trace.query("expert_importance").rows()
    assert [r["dormant"] for r in found] == [False, False, True, True]
    assert [r["dormant_but_causal"] for r in found] == [False, False, True, False]
    matches([r for r in both if r["result"] == "planted"], pd.DataFrame(found), "layer", "expert")


def test_the_view_is_the_rows_of_all_results(run: Path) -> None:
    rows = made_up(4, layers=(0,), sequences=1)
    write(run, "it's [b]", rows, said(rows))
    write(run, "b-interrupted", rows[:7], said(rows, interrupted=True))
    with open_trace(run) as trace:
        got = trace.sql("from counterfactual where result = $name", name="it's [b]").rows()
        counted = trace.sql("select result, count(*) as n from counterfactual group by 1").rows()
        assert "counterfactual" in trace.views
    expected = [{"run": run.name, "result": "it's [b]", **r} for r in rows]
    assert got == [{k: r[k] for k in got[0]} for r in expected]
    assert sorted(counted, key=lambda r: r["result"]) == [
        {"result": "b-interrupted", "n": 7},
        {"result": "it's [b]", "n": len(rows)},
    ]


def test_files_of_others_and_damaged_ones_are_left_out_and_refused_by_name(run: Path) -> None:
    rows = made_up(5, layers=(0,), sequences=1)
    good = write(run, "good", rows, said(rows))
    write(run, "silent", rows, None)
    odd = pa.table({"layer": [1]}).replace_schema_metadata({"moe_lens": "{}"})
    pq.write_table(odd, good.with_name("odd.parquet"))
    good.with_name("cut.parquet").write_bytes(good.read_bytes()[:200])
    with open_trace(run) as trace:
        found = trace.sql("select distinct result from counterfactual").rows()
    assert found == [{"result": "good"}]
    assert counterfactual.results(run) == ["cut", "good", "odd", "silent"]
    assert counterfactual.about(run, "good") == said(rows)
    for name in ("silent", "odd"):
        with pytest.raises(TraceError, match="not a result of moe-lens counterfactual"):
            counterfactual.about(run, name)
    with pytest.raises(TraceError, match="cannot be read"):
        counterfactual.about(run, "cut")
    with pytest.raises(TraceError, match="no counterfactual result"):
        counterfactual.about(run, "../meta")


def test_a_run_without_results_has_an_empty_view(run: Path) -> None:
    with open_trace(run) as trace:
        assert trace.sql("from counterfactual").rows() == []
        for name in ("expert_importance", "route_regret", "route_changes"):
            assert trace.query(name).rows() == []
        write(run, "late", made_up(6), said(made_up(6)))
        trace.refresh()
        assert len(trace.query("expert_importance").rows()) == 16


def test_a_result_that_is_replaced_while_the_trace_is_open(run: Path) -> None:
    write(run, "a", made_up(7), said(made_up(7)))
    with open_trace(run) as trace:
        before = trace.query("route_changes", result="a").rows()
        path = write(run, "a", made_up(8), said(made_up(8)))
        assert trace.query("route_changes", result="a").rows() != before
        path.unlink()
        assert trace.query("route_changes", result="a").rows() == []


def test_what_is_typed_on_the_sql_page_reads_results_and_nothing_beside_them(run: Path) -> None:
    path = write(run, "it's [b]", made_up(9), said(made_up(9)))
    found = ask([run], "select count(*) as n from counterfactual")
    assert found.result.rows() == [{"n": len(made_up(9))}]
    with pytest.raises(QueryError, match="cannot be used here"):
        ask([run], f"from read_parquet({literal(str(path))})")
