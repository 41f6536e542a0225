"""`load_coarse` against a plain loop over the rows of `load` that it sums."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reading import read_rows
from support.traces import arrow, layer_info, meta, segment, stream

from moe_lens.queries.session import open_trace
from moe_lens.trace import layout
from moe_lens.trace.meta import Attempt, Meta, write_meta
from moe_lens.trace.recover import recover
from moe_lens.trace.rollup import roll_up, write_rollup
from moe_lens.trace.schema import BUCKET, LOAD_COARSE, TABLES
from moe_lens.trace.store import TraceStore

COUNTS = ("routed", "processed", "overflowed", "dropped", "rerouted_in", "padding")
SUMS = (*COUNTS, "prob_sum", "weight_sum", "received")
KEYS = ("attempt", "phase", "layer", "tag", "expert")

Rows = list[dict[str, Any]]


@st.composite
def windows(draw: st.DrawFn, first: int = 0, attempt: int = 0) -> Rows:
    """Rows of `load`, window after window, as a writer appends them."""
    out: Rows = []
    window = first
    for _ in range(draw(st.integers(1, 8))):
        window += draw(st.sampled_from([0, 1, 40, 70]))
        phase = draw(st.sampled_from(["train", "eval"]))
        for key in draw(st.sets(st.tuples(*[st.integers(0, 2)] * 3), max_size=6)):
            layer, tag, expert = key
            numbers = {name: draw(st.integers(0, 9)) for name in COUNTS}
            for name in ("prob_sum", "weight_sum"):
                numbers[name] = draw(st.sampled_from([None, 0.25, 1.5]))
            numbers["received"] = draw(st.sampled_from([None, 4]))
            where = {"window": window, "step": window // 2, "phase": phase, "attempt": attempt}
            out.append({**where, "layer": layer, "tag": "abc"[tag], "expert": expert, **numbers})
        window += 1
    return out


def summed(rows: Rows, *by: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Sums of the columns over rows that agree in `by`; null where all are null."""
    out: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
    for row in rows:
        sums = out[tuple(row[name] for name in by)]
        for name in SUMS:
            if row[name] is not None:
                sums[name] = (sums.get(name) or 0) + row[name]
            else:
                sums.setdefault(name, None)
    return dict(out)


@settings(max_examples=100, deadline=None)
@given(windows())
def test_a_rollup_is_the_sum_of_its_windows(rows: Rows) -> None:
    got = roll_up(arrow("load", rows))
    assert got.schema == LOAD_COARSE.schema
    for row in rows:
        row["bucket"] = row["window"] // BUCKET
    expected = summed(rows, "bucket", *KEYS)
    coarse = [{**r, "bucket": r["first_window"] // BUCKET} for r in got.to_pylist()]
    assert summed(coarse, "bucket", *KEYS) == expected
    assert len(coarse) == len(expected)
    order = [(r["layer"], r["bucket"]) for r in coarse]
    assert order == sorted(order)
    for r in coarse:
        key = [r[name] for name in ("bucket", *KEYS)]
        inside = [x for x in rows if [x[name] for name in ("bucket", *KEYS)] == key]
        for name in ("window", "step"):
            values = [x[name] for x in inside]
            assert (r[f"first_{name}"], r[f"last_{name}"]) == (min(values), max(values))


def seal(run: Path, rows: Rows, seq: int) -> None:
    """A segment of `load` with its rollup, however little that saves."""
    if not rows:
        return
    segment(run, "load", rows, seq=seq)
    path = layout.segment_path(run, LOAD_COARSE.name, 0, seq)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(roll_up(arrow("load", rows)), path)


def attempts(*first_steps: int) -> Meta:
    tries = [Attempt(i, i, first_step=s, end="closed") for i, s in enumerate(first_steps)]
    return meta(0, attempts=tries, layers=[layer_info(i, 3) for i in range(3)])


@settings(max_examples=40, deadline=None)
@given(windows(), windows(first=300), windows(first=600, attempt=1), st.data())
def test_the_view_sums_what_counts_once(a: Rows, b: Rows, c: Rows, data: st.DataObject) -> None:
    """Rollups, a segment without one, an open stream, and an attempt that was overtaken."""
    again = data.draw(st.integers(0, 400), label="first step of the second attempt")
    with TemporaryDirectory() as folder:
        run = Path(folder)
        write_meta(run, attempts(0, again))
        seal(run, a, seq=0)
        if data.draw(st.booleans(), label="with a rollup"):
            seal(run, b, seq=1)
        else:
            segment(run, "load", b, seq=1)
        stream(run, "load", c, seq=2)
        valid = [r for r in a + b if r["step"] < again] + c
        with open_trace(run) as trace:
            coarse = trace.table("load_coarse").rows()
            fine = trace.table("load").rows()
        assert summed(coarse, *KEYS) == summed(fine, *KEYS) == summed(valid, *KEYS)


def many(windows: int, phase: str = "train") -> Rows:
    return [
        {"window": w, "step": w, "phase": phase, "layer": layer, "tag": "a", "expert": e,
         "routed": e + 1, "processed": e + 1}
        for w in range(windows) for layer in range(2) for e in range(4)
    ]  # fmt: skip


def test_sealing_writes_a_rollup_where_it_saves_something(tmp_path: Path) -> None:
    for name, windows, rolled in (("long", 130, 3 * 8), ("short", 3, None)):
        run = tmp_path / name
        store = TraceStore(run, meta())
        store.append("load", arrow("load", many(windows)))
        store.close()
        path = layout.segment_path(run, LOAD_COARSE.name, 0, 0)
        assert path.exists() is (rolled is not None)
        if rolled is not None:
            assert pq.read_metadata(path).num_rows == rolled


def test_recover_writes_it_too_and_clears_what_was_begun(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(attempts=[Attempt(0, 0, first_step=0)]))
    stream(tmp_path, "load", many(130))
    half = layout.segment_dir(tmp_path, LOAD_COARSE.name, 0) / ".seg-00000000.tmp"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"PAR1")
    recover(tmp_path)
    assert [p.name for p in half.parent.iterdir()] == ["seg-00000000.parquet"]
    assert len(read_rows(tmp_path, "load")) == 130 * 8


@pytest.mark.parametrize("left", [0, 10, 400])
def test_a_damaged_rollup_costs_nothing(tmp_path: Path, left: int) -> None:
    write_meta(tmp_path, meta())
    seal(tmp_path, many(130), seq=0)
    path = layout.segment_path(tmp_path, LOAD_COARSE.name, 0, 0)
    path.write_bytes(path.read_bytes()[:left])
    with open_trace(tmp_path) as trace:
        assert len(trace.table("load_coarse")) == 130 * 8
        assert not trace.info().runs[0].damaged


def test_a_rollup_without_its_segment_does_not_count(tmp_path: Path) -> None:
    """A writer that dies between the two leaves the rows in the stream."""
    write_meta(tmp_path, meta())
    write_rollup(tmp_path, 0, 0, arrow("load", many(130)))
    stream(tmp_path, "load", many(130))
    with open_trace(tmp_path) as trace:
        got = trace.sql("select sum(routed) n from load_coarse").rows()
    assert got == [{"n": 130 * 2 * 10}]


def test_nothing_rolls_up_to_nothing() -> None:
    assert roll_up(TABLES["load"].schema.empty_table()).num_rows == 0
    assert isinstance(roll_up(arrow("load", many(1))), pa.Table)
