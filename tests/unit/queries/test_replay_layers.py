"""The view `replay` and its question, against a plain Python summary of what was written."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.replayed import ABOUT, timings, write
from support.traces import write_run

from moe_lens.errors import TraceError
from moe_lens.queries.replayed import about
from moe_lens.queries.session import open_trace
from moe_lens.replay.summary import P90_FROM, P99_FROM, by_layer


def quantile(values: list[float], q: float) -> float:
    """Between the two nearest of them, in proportion."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run").path


def test_it_is_what_a_plain_summary_says(run: Path) -> None:
    results = {"a": timings(1), "it's [b]": timings(2)}
    for name, found in results.items():
        write(run, name, found)
    with open_trace(run) as trace:
        got = trace.query("replay_layers").rows()
        one = trace.query("replay_layers", result="a", phase="eval", first_layer=1).rows()
        early = trace.query("replay_layers", result="a", first_step=1, last_step=2, rank=0).rows()
        assert trace.sql("select count(*) as n from replay").rows() == [{"n": 28}]
    keys = [(name, phase, n) for name in results for phase in ("eval", "train") for n in (0, 3)]
    assert [(r["result"], r["phase"], r["layer"]) for r in got] == keys
    assert [(r["result"], r["phase"], r["layer"]) for r in one] == [("a", "eval", 3)]
    assert [r["forwards"] for r in early] == [1, 1, 1, 1]  # step 2 evaluates, step 1 trains
    for r in got:
        of = [
            x for x in results[r["result"]] if (x["phase"], x["layer"]) == (r["phase"], r["layer"])
        ]
        time = sum(x["time_ns"] for x in of)
        assert r["forwards"] == len(of)
        assert r["tokens"] == sum(x["tokens"] for x in of)
        times = [x["time_ns"] / 1e6 for x in of]
        assert r["p50_ms"] == pytest.approx(quantile(times, 0.5))
        assert r["max_ms"] == pytest.approx(max(times))
        assert r["p90_ms"] is r["p99_ms"] is None  # of three or four forwards
        for twin in ("balanced", "same_touched", "floor"):
            assert r[f"{twin}_ms"] == pytest.approx(
                quantile([x[f"{twin}_ns"] / 1e6 for x in of], 0.5)
            )
            assert r[f"over_{twin}"] == pytest.approx(time / sum(x[f"{twin}_ns"] for x in of))
        drift = abs(sum(x["again_ns"] - x["time_ns"] for x in of))
        spread = math.sqrt(sum(x["noise_ns"] ** 2 for x in of))
        assert r["noise"] == pytest.approx(max(drift, spread) / time)
        assert r["rows_max"] == max(x["rows_max"] for x in of)
        for what in ("dropped", "rerouted"):
            share = sum(x[what] for x in of) / sum(x["slots"] for x in of)
            assert r[f"{what}_share"] == pytest.approx(share)
        assert r["flop_per_s"] == pytest.approx(1e9 * sum(x["flop"] for x in of) / time)


@pytest.mark.parametrize("forwards", [P90_FROM - 1, P90_FROM, P99_FROM - 1, P99_FROM])
def test_percentiles_take_as_many_forwards_as_on_the_terminal(run: Path, forwards: int) -> None:
    found = [row | {"phase": "eval"} for row in timings(5, forwards)]
    write(run, "a", found)
    with open_trace(run) as trace:
        got = trace.query("replay_layers").rows()
    assert [r["forwards"] for r in got] == [forwards] * 2
    for r, said in zip(got, by_layer(found), strict=True):
        for q in ("p50", "p90", "p99", "max"):
            wanted = said[f"{q}_ns"]
            assert r[f"{q}_ms"] == (None if wanted is None else pytest.approx(wanted / 1e6))
        times = [x["time_ns"] / 1e6 for x in found if x["layer"] == r["layer"]]
        if forwards >= P90_FROM:
            assert r["p90_ms"] == pytest.approx(quantile(times, 0.9))
        if forwards >= P99_FROM:
            assert r["p99_ms"] == pytest.approx(quantile(times, 0.99))


def test_a_run_that_was_not_replayed_has_no_rows(run: Path) -> None:
    with open_trace(run) as trace:
        assert trace.query("replay_layers").rows() == []


def test_files_of_others_and_damaged_ones_are_left_out(run: Path) -> None:
    write(run, "good", timings(1, 1))
    write(run, "foreign", timings(1, 1), said=None)
    write(run, "odd", timings(1, 1), said=[1])
    pq.write_table(pa.table({"layer": [1]}), run / "replay" / "short.parquet")
    (run / "replay" / "bad.parquet").write_bytes(b"PAR1")
    with open_trace(run) as trace:
        found = trace.sql("select distinct result from replay").rows()
    assert found == [{"result": "good"}]
    assert about(run, "good") == ABOUT
    assert about(run, "foreign") is about(run, "odd") is None
    with pytest.raises(TraceError, match="cannot be read"):
        about(run, "bad")
    with pytest.raises(TraceError, match="no replay result"):
        about(run, "../meta")


def test_a_result_that_comes_later_is_seen_after_refresh(run: Path) -> None:
    with open_trace(run) as trace:
        write(run, "late", timings(3))
        assert trace.query("replay_layers").rows() == []
        trace.refresh()
        assert len(trace.query("replay_layers").rows()) == 4
