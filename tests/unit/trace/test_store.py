"""The store: when a stream becomes a segment, how the disk bound is kept, how numbering goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.reading import new_meta, read_rows

from moe_lens.trace import layout, store
from moe_lens.trace.meta import read_meta
from moe_lens.trace.schema import TABLES
from moe_lens.trace.segment import write_segment
from moe_lens.trace.store import TraceStore, next_seq, seal_stream


def outcomes(n: int, first: int = 0) -> pa.Table:
    """Rows of a per-token table, which compress badly."""
    loss = np.random.default_rng(first).random(n, dtype=np.float32)
    columns: dict[str, Any] = {
        "attempt": np.zeros(n, np.int32),
        "step": np.zeros(n, np.int64),
        "forward": np.zeros(n, np.int32),
        "sequence": np.arange(first, first + n),
        "position": pa.nulls(n, pa.int32()),
        "kept": pa.nulls(n, pa.bool_()),
        "loss": loss,
    }
    return pa.table(columns, schema=TABLES["outcomes"].schema)


def layers(n: int, first: int = 0) -> pa.Table:
    """Rows of a table of counts."""
    schema = TABLES["layers"].schema
    zeros = {f.name: [0] * n for f in schema if f.name != "phase"}
    zeros |= {"phase": ["eval"] * n, "window": list(range(first, first + n))}
    return pa.table({f.name: zeros[f.name] for f in schema}, schema=schema)


def sequences_of(run: Path) -> list[int]:
    return [r["sequence"] for r in read_rows(run, "outcomes")]


def segments(run: Path, name: str = "outcomes") -> list[int]:
    return list(layout.segments(run, name, 0))


def streams(run: Path) -> list[tuple[str, int]]:
    return sorted(layout.streams(run, 0))


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


def test_a_full_stream_becomes_a_segment(tmp_path: Path) -> None:
    s = TraceStore(tmp_path, new_meta(), seal_rows=10)
    s.append("outcomes", outcomes(9))
    assert (segments(tmp_path), streams(tmp_path)) == ([], [("outcomes", 0)])
    s.append("outcomes", outcomes(1, first=9))
    assert (segments(tmp_path), streams(tmp_path)) == ([0], [])
    s.append("outcomes", outcomes(4, first=10))
    assert (segments(tmp_path), streams(tmp_path)) == ([0], [("outcomes", 1)])
    assert sequences_of(tmp_path) == list(range(14))
    s.close()
    assert (segments(tmp_path), streams(tmp_path)) == ([0, 1], [])
    assert sequences_of(tmp_path) == list(range(14))


def test_no_rows_open_no_stream(tmp_path: Path) -> None:
    s = TraceStore(tmp_path, new_meta())
    s.append("outcomes", outcomes(0))
    s.close()
    assert (segments(tmp_path), streams(tmp_path)) == ([], [])


def test_an_old_stream_becomes_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(store, "time", clock)
    s = TraceStore(tmp_path, new_meta(), seal_seconds=600)
    s.append("outcomes", outcomes(3))
    clock.now += 300
    s.append("layers", layers(1))
    s.append("outcomes", outcomes(3, first=3))  # does not make the stream young again
    clock.now += 299
    s.seal_old()
    assert len(streams(tmp_path)) == 2
    clock.now += 1
    s.seal_old()
    assert (segments(tmp_path), streams(tmp_path)) == ([0], [("layers", 0)])
    assert sequences_of(tmp_path) == list(range(6))
    s.close()


def test_numbers_go_on_after_reopening(tmp_path: Path) -> None:
    first = TraceStore(tmp_path, new_meta(), seal_rows=2)
    for n in range(3):
        first.append("outcomes", outcomes(2, first=2 * n))
    first.append("layers", layers(1))
    first.append("outcomes", outcomes(1, first=6))
    first.abandon()  # dead: the streams outcomes-3 and layers-0 stay
    assert next_seq(tmp_path, "outcomes", 0) == 4
    assert next_seq(tmp_path, "layers", 0) == 1
    assert next_seq(tmp_path, "load", 0) == 0
    assert next_seq(tmp_path, "outcomes", 1) == 0
    second = TraceStore(tmp_path, new_meta(), seal_rows=2)
    second.append("outcomes", outcomes(2, first=7))
    assert segments(tmp_path) == [0, 1, 2, 4]
    assert sorted(sequences_of(tmp_path)) == list(range(9))
    second.close()


def test_abandoned_rows_stay_readable(tmp_path: Path) -> None:
    s = TraceStore(tmp_path, new_meta())
    s.append("outcomes", outcomes(5))
    s.abandon()
    assert sequences_of(tmp_path) == list(range(5))
    assert segments(tmp_path) == []


def test_the_oldest_rows_of_tokens_go_first_and_counts_never(tmp_path: Path) -> None:
    bound = 40_000
    meta = new_meta()
    s = TraceStore(tmp_path, meta, max_bytes=bound)
    for n in range(40):
        s.append("outcomes", outcomes(500, first=500 * n))
        s.append("layers", layers(1, first=n))
    s.close()
    on_disk = sum(p.stat().st_size for p in tmp_path.rglob("*.parquet"))
    assert on_disk <= bound
    left = sequences_of(tmp_path)
    assert left == list(range(20_000 - len(left), 20_000))  # the newest, without a gap
    assert 0 < len(left) < 20_000
    assert meta.pruned == {"outcomes": 20_000 - len(left)}
    assert read_meta(layout.meta_path(tmp_path, 0)).pruned == meta.pruned
    assert [r["window"] for r in read_rows(tmp_path, "layers")] == list(range(40))
    assert meta.warnings == {}


def test_the_bound_holds_while_recording_with_the_open_streams(tmp_path: Path) -> None:
    bound = 40_000
    s = TraceStore(tmp_path, new_meta(), max_bytes=bound)
    for n in range(40):
        s.append("outcomes", outcomes(100, first=100 * n))
        files = [*tmp_path.rglob("*.parquet"), *tmp_path.rglob("*.arrows")]
        assert sum(p.stat().st_size for p in files) <= bound + 100 * 40
    s.close()


def test_a_bound_too_small_for_the_counts_alone_is_warned_of(tmp_path: Path) -> None:
    meta = new_meta()
    s = TraceStore(tmp_path, meta, max_bytes=1000)
    s.append("outcomes", outcomes(100))
    assert segments(tmp_path) == []
    for n in range(3):
        s.append("layers", layers(200, first=200 * n))
    s.close()
    assert len(read_rows(tmp_path, "layers")) == 600
    assert meta.pruned == {"outcomes": 100}
    (text,) = meta.warnings
    assert "counts alone" in text
    assert read_meta(layout.meta_path(tmp_path, 0)).warnings == meta.warnings


def test_without_a_bound_nothing_is_removed(tmp_path: Path) -> None:
    meta = new_meta()
    s = TraceStore(tmp_path, meta, seal_rows=100)
    for n in range(5):
        s.append("outcomes", outcomes(100, first=100 * n))
    s.close()
    assert sequences_of(tmp_path) == list(range(500))
    assert meta.pruned == {}


def test_what_was_pruned_is_on_disk_before_it_is_gone(tmp_path: Path) -> None:
    meta = new_meta()
    s = TraceStore(tmp_path, meta, max_bytes=1000)
    s.append("outcomes", outcomes(1000))
    s.abandon()  # dies here
    assert meta.pruned == {"outcomes": 1000}
    assert read_meta(layout.meta_path(tmp_path, 0)).pruned == {"outcomes": 1000}


def test_the_meta_is_on_disk_before_any_row(tmp_path: Path) -> None:
    s = TraceStore(tmp_path, new_meta(model="TinyMoE"))
    assert read_meta(layout.meta_path(tmp_path, 0)).model == "TinyMoE"
    s.close()


def test_the_users_keys_are_columns(tmp_path: Path) -> None:
    s = TraceStore(tmp_path, new_meta(keys=["source"]))
    table = s.tables["sequences"]
    assert table.schema.names[-1] == "source"
    assert "source" not in TABLES["sequences"].schema.names
    s.close()


def test_a_segment_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    s = TraceStore(tmp_path, new_meta())
    s.append("outcomes", outcomes(5))
    s.abandon()
    write_segment(layout.segment_path(tmp_path, "outcomes", 0, 0), TABLES["outcomes"], outcomes(5))
    assert seal_stream(tmp_path, TABLES["outcomes"], 0, 0) == 0
    assert streams(tmp_path) == []
    assert sequences_of(tmp_path) == list(range(5))


def test_a_seal_that_fails_keeps_the_rows_in_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = TraceStore(tmp_path, new_meta(), seal_rows=5)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_segment", refuse)
        with pytest.raises(OSError, match="No space"):
            s.append("outcomes", outcomes(5))
    assert (segments(tmp_path), streams(tmp_path)) == ([], [("outcomes", 0)])
    assert sequences_of(tmp_path) == list(range(5))
    assert seal_stream(tmp_path, TABLES["outcomes"], 0, 0) == 5
    assert sequences_of(tmp_path) == list(range(5))
