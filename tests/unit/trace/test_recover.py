"""Recovery: what a dead writer left is sealed, once; what lives is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.reading import new_meta, read_rows
from support.traces import arrow, stream

from moe_lens.errors import TraceError, TraceLocked
from moe_lens.trace import layout
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Attempt, Meta, read_meta, write_meta
from moe_lens.trace.reader import open_run
from moe_lens.trace.recover import Recovered, next_value, recover, recover_rank
from moe_lens.trace.store import TraceStore
from moe_lens.trace.stream import OpenStream


def rows(table: str, n: int, first: int = 0, **more: Any) -> Any:
    return arrow(table, [{"step": first + i, "window": first + i, **more} for i in range(n)])


def left_by_a_dead_writer(run: Path, rank: int = 0, **meta: Any) -> Meta:
    """Two sealed segments of `load`, and open streams of `load` and `steps`."""
    info = new_meta(rank=rank, **meta)
    store = TraceStore(run, info, seal_rows=10)
    for first in (0, 10, 20):
        store.append("load", rows("load", 10 if first < 20 else 7, first))
    store.append("steps", rows("steps", 3))
    store.abandon()
    return info


def attempts(run: Path, rank: int = 0) -> list[Attempt]:
    return read_meta(layout.meta_path(run, rank)).attempts


def steps(run: Path, table: str = "load") -> list[int]:
    return [r["step"] for r in read_rows(run, table)]


def everything(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != "lock"}


def test_leftovers_are_sealed(tmp_path: Path) -> None:
    left_by_a_dead_writer(tmp_path)
    before = {name: read_rows(tmp_path, name) for name in ("load", "steps")}
    began = time.time_ns()
    assert recover(tmp_path) == [Recovered(0, "load", 7), Recovered(0, "steps", 3)]
    assert layout.streams(tmp_path, 0) == {}
    assert list(layout.segments(tmp_path, "load", 0)) == [0, 1, 2]
    assert {name: read_rows(tmp_path, name) for name in before} == before
    assert steps(tmp_path) == list(range(27))
    (attempt,) = attempts(tmp_path)
    assert attempt.end == "recovered"
    assert attempt.ended_ns is not None
    assert began <= attempt.ended_ns <= time.time_ns()
    assert not open_run(tmp_path).unfinished


def test_a_second_time_there_is_nothing_to_do(tmp_path: Path) -> None:
    left_by_a_dead_writer(tmp_path)
    recover(tmp_path)
    before = everything(tmp_path)
    assert recover(tmp_path) == []
    assert everything(tmp_path) == before


def test_a_closed_trace_is_left_as_it_is(tmp_path: Path) -> None:
    meta = new_meta(attempts=[Attempt(0, 1, first_step=0, ended_ns=2, end="closed")])
    store = TraceStore(tmp_path, meta)
    store.append("load", rows("load", 3))
    store.close()
    before = everything(tmp_path)
    assert recover(tmp_path) == []
    assert everything(tmp_path) == before


def test_a_writer_that_died_with_nothing_open_is_marked_recovered(tmp_path: Path) -> None:
    write_meta(
        tmp_path, new_meta(attempts=[Attempt(0, 1, end="closed", ended_ns=2), Attempt(1, 3)])
    )
    assert recover(tmp_path) == []
    assert [a.end for a in attempts(tmp_path)] == ["closed", "recovered"]


@pytest.mark.parametrize("cut", [1, 9, 200])
def test_a_torn_tail_is_dropped(tmp_path: Path, cut: int) -> None:
    write_meta(tmp_path, new_meta())
    path = stream(tmp_path, "load", [{"step": i} for i in range(30)], batches=3)
    path.write_bytes(path.read_bytes()[:-cut])
    assert recover(tmp_path) == [Recovered(0, "load", 20)]
    assert steps(tmp_path) == list(range(20))
    assert layout.streams(tmp_path, 0) == {}


@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_stream_torn_in_its_schema_is_removed(tmp_path: Path, size: int) -> None:
    write_meta(tmp_path, new_meta())
    path = stream(tmp_path, "load", [{"step": 1}])
    path.write_bytes(path.read_bytes()[:size])
    assert recover(tmp_path) == []
    assert not path.exists()
    assert read_rows(tmp_path, "load") == []


def test_a_stream_without_rows_leaves_no_segment(tmp_path: Path) -> None:
    write_meta(tmp_path, new_meta())
    OpenStream(layout.stream_path(tmp_path, "load", 0, 0), rows("load", 0).schema).close()
    assert recover(tmp_path) == []
    assert layout.streams(tmp_path, 0) == layout.segments(tmp_path, "load", 0) == {}


def test_rows_whose_stream_outlived_their_segment_are_not_doubled(tmp_path: Path) -> None:
    left_by_a_dead_writer(tmp_path)
    stream(tmp_path, "load", [{"step": i} for i in range(10, 20)], seq=1)  # is sealed: seg 1
    assert recover(tmp_path) == [Recovered(0, "load", 7), Recovered(0, "steps", 3)]
    assert steps(tmp_path) == list(range(27))
    assert layout.streams(tmp_path, 0) == {}


def test_temporary_files_are_removed(tmp_path: Path) -> None:
    left_by_a_dead_writer(tmp_path)
    folder = layout.segment_dir(tmp_path, "load", 0)
    for n in (2, 5):  # of the stream that is sealed again, and of one that nobody knows
        (folder / f".seg-0000000{n}.tmp").write_bytes(b"PAR1 half of a segment")
    (folder / "notes.tmp.txt").write_text("not ours")
    recover(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "notes.tmp.txt",
        *(f"seg-0000000{n}.parquet" for n in range(3)),
    ]


def test_the_users_keys_are_kept(tmp_path: Path) -> None:
    store = TraceStore(tmp_path, new_meta(keys=["source"]))
    row = {"sequence": 4, "source": "a.py"}
    store.append("sequences", arrow("sequences", [row], keys=("source",)))
    store.abandon()
    recover(str(tmp_path))
    assert [r["source"] for r in read_rows(tmp_path, "sequences")] == ["a.py"]


def test_a_live_trace_is_refused_and_not_touched(tmp_path: Path) -> None:
    left_by_a_dead_writer(tmp_path)
    lock = RankLock(tmp_path, 0)
    before = everything(tmp_path)
    with pytest.raises(TraceLocked):
        recover(tmp_path)
    assert everything(tmp_path) == before
    lock.release()
    assert len(recover(tmp_path)) == 2


def test_ranks_before_a_living_one_are_recovered(tmp_path: Path) -> None:
    for rank in range(2):
        left_by_a_dead_writer(tmp_path, rank, world=2)
    lock = RankLock(tmp_path, 1)
    with pytest.raises(TraceLocked, match="rank 1"):
        recover(tmp_path)
    assert [attempts(tmp_path, rank)[0].end for rank in range(2)] == ["recovered", None]
    lock.release()
    assert recover(tmp_path) == [Recovered(1, "load", 7), Recovered(1, "steps", 3)]


def test_no_trace_is_an_error_and_nothing_is_made(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TraceError, match="holds no moe_lens trace") as error:
            recover(path)
        assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_given_back_whatever_happens(tmp_path: Path) -> None:
    left_by_a_dead_writer(tmp_path)
    path = layout.meta_path(tmp_path, 0)
    good = path.read_text()
    path.write_text("{")
    with pytest.raises(TraceError, match="not a moe_lens meta file"):
        recover(tmp_path)
    path.write_text(good)
    recover(tmp_path)
    RankLock(tmp_path, 0).release()


def test_the_meta_that_the_caller_holds_is_brought_up_to_date(tmp_path: Path) -> None:
    meta = left_by_a_dead_writer(tmp_path)
    recover_rank(tmp_path, meta)
    assert meta.attempts[0].end == "recovered"
    assert attempts(tmp_path) == meta.attempts


def test_the_next_number_is_one_above_all_segments(tmp_path: Path) -> None:
    meta = new_meta()
    assert next_value(tmp_path, meta, "steps", "window") == 0
    store = TraceStore(tmp_path, meta, seal_rows=5)
    store.append("steps", rows("steps", 5, first=20))
    store.append("steps", rows("steps", 5, first=3))
    store.close()
    assert next_value(tmp_path, meta, "steps", "window") == 25
    assert next_value(tmp_path, meta, "steps", "forward") == 1
    assert next_value(tmp_path, new_meta(rank=1), "steps", "window") == 0


def test_a_damaged_segment_has_no_next_value(tmp_path: Path) -> None:
    store = TraceStore(tmp_path, new_meta(), seal_rows=5)
    store.append("steps", rows("steps", 5))
    store.close()
    (path,) = layout.segments(tmp_path, "steps", 0).values()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceError, match=r"\.parquet is damaged .* into another folder\.$"):
        next_value(tmp_path, new_meta(), "steps", "step")
