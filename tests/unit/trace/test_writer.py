"""The writer's thread: what flush promises, what a full queue and a refusing disk cost."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.events import Router, event, losses_event, seen
from support.reading import new_meta, read_rows

from moe_lens.errors import TraceWriteError
from moe_lens.trace import layout, writer
from moe_lens.trace.events import Forward, StagedForward, StepEnd
from moe_lens.trace.meta import Meta, read_meta
from moe_lens.trace.schema import TABLES
from moe_lens.trace.writer import TraceWriter

LAYERS = 2
TOKENS = 7
MODEL = [Router(n, 8, 2, logits=True) for n in range(LAYERS)]


def forward(step: int, **more: Any) -> Forward:
    fields: dict[str, Any] = {"lengths": (4, 3), "first_sequence": 2 * step, "seed": step}
    return event(seen(MODEL, step=step, phase="train", **fields | more))


def routed(run: Path) -> dict[int, int]:
    """Choices counted, by step."""
    out: dict[int, int] = {}
    for r in read_rows(run, "load"):
        out[r["step"]] = out.get(r["step"], 0) + r["routed"]
    return out


def rows_of_steps(run: Path) -> dict[int, int]:
    out: dict[int, int] = {}
    for r in read_rows(run, "routing"):
        out[r["step"]] = out.get(r["step"], 0) + 1
    return out


class Gate:
    """Holds the writer's thread up in front of the disk."""

    def __init__(self, w: TraceWriter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        append = w._store.append

        def wait(name: str, rows: Any) -> None:
            self.reached.set()
            assert self.open.wait(30)
            append(name, rows)

        monkeypatch.setattr(w._store, "append", wait)


@pytest.fixture
def w(tmp_path: Path) -> Iterator[TraceWriter]:
    w = TraceWriter(tmp_path, new_meta())
    yield w
    try:
        w.close()
    except TraceWriteError:
        assert w.failed is not None


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- flush and close ----------------------------------------------------------------------------


def test_flush_returns_when_the_rows_can_be_read(w: TraceWriter) -> None:
    for step in range(3):
        f = seen(MODEL, step=step, phase="eval", losses=True, first_sequence=2 * step)
        w.put(event(f))
        w.put(losses_event(f))
        w.flush()
        for name in TABLES:
            assert read_rows(w.run, name), f"{name} after step {step}"
        assert sorted(routed(w.run)) == sorted(rows_of_steps(w.run)) == list(range(step + 1))
    w.close()
    assert set(routed(w.run).values()) == {TOKENS * 2 * LAYERS}


def test_flush_syncs_what_it_wrote(w: TraceWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    append, sync = w._store.append, w._store.sync
    monkeypatch.setattr(w._store, "append", lambda n, t: (order.append(n), append(n, t)))
    monkeypatch.setattr(w._store, "sync", lambda: (order.append("sync"), sync()))
    w.put(forward(0))
    w.flush()
    assert {"load", "routing", "steps"} < set(order)
    assert order[-1] == "sync"


def test_a_second_flush_writes_nothing_twice(w: TraceWriter) -> None:
    w.put(forward(0))
    for _ in range(3):
        w.flush()
    w.close()
    assert routed(w.run) == {0: TOKENS * 2 * LAYERS}
    assert len(read_rows(w.run, "slices")) == len({r["tag"] for r in read_rows(w.run, "slices")})


def test_close_seals_everything(w: TraceWriter) -> None:
    for step in range(5):
        w.put(forward(step))
    w.close()
    assert layout.streams(w.run, 0) == {}
    assert routed(w.run) == dict.fromkeys(range(5), TOKENS * 2 * LAYERS)


def test_a_closed_writer_takes_nothing_and_says_so(w: TraceWriter) -> None:
    w.put(forward(0))
    w.close()
    for late in (lambda: w.put(forward(1)), w.flush, lambda: w.edit(lambda m: None)):
        with pytest.raises(TraceWriteError, match="closed") as error:
            late()
        assert str(w.run) in str(error.value)
    w.close()  # a second time does nothing
    assert sorted(routed(w.run)) == [0]


def test_a_writer_that_got_nothing_leaves_a_readable_trace(w: TraceWriter) -> None:
    w.flush()
    w.close()
    assert all(read_rows(w.run, name) == [] for name in TABLES)


def test_windows_go_on_from_the_first_number(tmp_path: Path) -> None:
    w = TraceWriter(tmp_path, new_meta(), first_window=7)
    for step in range(2):
        w.put(forward(step))
    w.close()
    assert [r["window"] for r in read_rows(tmp_path, "steps")] == [7, 8]
    assert {r["window"] for r in read_rows(tmp_path, "load")} == {7, 8}


def test_full_streams_are_sealed_while_recording(tmp_path: Path) -> None:
    w = TraceWriter(tmp_path, new_meta(), seal_rows=TOKENS * LAYERS)
    for step in range(3):
        w.put(forward(step))
        w.flush()
    assert list(layout.segments(tmp_path, "routing", 0)) == [0, 1, 2]
    w.close()


# ---- the meta -----------------------------------------------------------------------------------


def test_the_first_step_is_on_disk_before_its_rows(
    w: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(w, monkeypatch)
    w.put(forward(5))
    w.put(forward(6))
    assert gate.reached.wait(30)
    assert read_meta(layout.meta_path(w.run, 0)).attempts[0].first_step == 5
    gate.open.set()
    w.close()
    assert read_meta(layout.meta_path(w.run, 0)).attempts[0].first_step == 5


def test_an_edit_of_the_meta_comes_after_the_events_before_it(w: TraceWriter) -> None:
    def change(meta: Meta) -> None:
        meta.warnings["seen"] = meta.attempts[0].first_step or -1
        assert threading.current_thread() is w._thread

    w.put(forward(3))
    w.edit(change)
    w.flush()
    assert read_meta(layout.meta_path(w.run, 0)).warnings == {"seen": 3}


# ---- breaches -----------------------------------------------------------------------------------


def broken(step: int) -> Forward:
    f = forward(step)
    f.fires_expected += 1
    f.layers[1].routed_GE = f.layers[1].routed_GE + 1
    return f


def test_breaches_are_counted_in_their_step_and_handed_out_once(w: TraceWriter) -> None:
    for step in range(3):
        w.put(broken(step) if step == 1 else forward(step))
    w.flush()
    found = w.take_breaches()
    assert found
    assert all(text.startswith("step 1, forward 0: ") for text in found)
    assert w.take_breaches() == []
    assert w.breach_count == len(found)
    counted = {r["step"]: r["breaches"] for r in read_rows(w.run, "steps")}
    assert counted == {0: 0, 1: len(found), 2: 0}
    w.put(broken(3))
    w.flush()
    assert [text[:6] for text in w.take_breaches()] == ["step 3"] * len(found)


def test_of_many_breaches_the_newest_hundred_are_told_and_all_are_counted(w: TraceWriter) -> None:
    for step in range(150):
        f = event(seen([], step=step, lengths=()))
        f.fires_expected = 1
        w.put(f)
    w.flush()
    found = w.take_breaches()
    assert [text.split(",")[0] for text in found] == [f"step {n}" for n in range(50, 150)]
    assert w.breach_count == 150
    assert sum(r["breaches"] for r in read_rows(w.run, "steps")) == 150


# ---- the queue ----------------------------------------------------------------------------------


def test_over_its_bytes_the_queue_gives_up_rows_a_forward_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3 * forward(1).row_bytes  # odd steps have token ids and are larger
    w = TraceWriter(tmp_path, new_meta(), queue_bytes=room)
    gate = Gate(w, monkeypatch)
    w.put(forward(0))
    assert gate.reached.wait(30)  # step 0 still holds its bytes: the disk has not taken it
    for step in range(1, 8):
        w.put(forward(step))
    gate.open.set()
    w.flush()
    assert w.lost_rows == 5 * TOKENS * LAYERS
    w.put(forward(8))  # there is room again
    w.close()
    assert rows_of_steps(tmp_path) == dict.fromkeys((0, 1, 2, 8), TOKENS * LAYERS)
    for name in ("tokens", "logits"):
        assert {r["step"] for r in read_rows(tmp_path, name)} == {0, 1, 2, 8}
    lost = {r["step"]: r["lost_rows"] for r in read_rows(tmp_path, "steps")}
    assert lost == dict.fromkeys((0, 1, 2, 8), 0) | dict.fromkeys(range(3, 8), TOKENS * LAYERS)
    assert routed(tmp_path) == dict.fromkeys(range(9), TOKENS * 2 * LAYERS)  # counts are exact


def test_a_sequence_whose_first_rows_were_given_up_is_still_listed(tmp_path: Path) -> None:
    known: set[int] = set()
    prompt = event(seen(MODEL, lengths=(9,), phase="prefill"), known=known)
    more = event(seen(MODEL, lengths=(1,), phase="decode", step=1), known=known)
    w = TraceWriter(tmp_path, new_meta(), queue_bytes=more.row_bytes)
    for f in (prompt, more):
        w.put(f)
        w.flush()
    w.close()
    assert [r["sequence"] for r in read_rows(tmp_path, "tokens")] == [0]
    assert [r["sequence"] for r in read_rows(tmp_path, "sequences")] == [0]


def test_a_forward_too_large_for_the_queue_gives_up_its_rows_alone(tmp_path: Path) -> None:
    small = forward(0, lengths=(1,))
    w = TraceWriter(tmp_path, new_meta(), queue_bytes=small.row_bytes)
    for f in (small, forward(1), forward(2, kept=0.0)):
        w.put(f)
        w.flush()
    w.close()
    assert rows_of_steps(tmp_path) == {0: LAYERS}
    assert w.lost_rows == TOKENS * LAYERS
    assert [r["lost_rows"] for r in read_rows(tmp_path, "steps")] == [0, TOKENS * LAYERS, 0]


def test_put_waits_while_too_many_events_wait_and_loses_none(
    w: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "QUEUE_EVENTS", 4)
    gate = Gate(w, monkeypatch)
    w.put(forward(0))
    assert gate.reached.wait(30)
    for step in range(1, 5):
        w.put(forward(step))
    assert w.waiting == 4
    late = threading.Thread(target=w.put, args=(forward(5),))
    late.start()
    late.join(0.1)
    assert late.is_alive()
    assert w.waiting == 4
    gate.open.set()
    late.join(30)
    assert not late.is_alive()
    w.close()
    assert sorted(routed(w.run)) == list(range(6))


def test_who_waits_for_room_and_wakes_after_the_end_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(threading.Condition):
        """The thread that flushes is woken, and looks only when the writer has ended."""

        def wait(self, timeout: float | None = None) -> bool:
            woken = super().wait(timeout)
            if threading.current_thread().name == "flusher" and self is w._changed:
                self.release()
                w._thread.join(30)
                self.acquire()
            return woken

    monkeypatch.setattr(writer, "QUEUE_EVENTS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Condition", Slow)
        w = TraceWriter(tmp_path, new_meta())
    gate, said = Gate(w, monkeypatch), list[str]()

    def flush() -> None:
        try:
            w.flush()
        except TraceWriteError as e:
            said.append(str(e))

    w.put(forward(0))
    assert gate.reached.wait(30)
    w.put(forward(1))  # the queue is full
    flusher = threading.Thread(target=flush, name="flusher", daemon=True)
    flusher.start()
    closer = threading.Thread(target=w.close)
    closer.start()
    while not w._closing:
        pass
    gate.open.set()
    closer.join(30)
    flusher.join(30)
    assert not flusher.is_alive()
    assert said == [f"the recording into {tmp_path} was closed meanwhile"]
    assert set(routed(tmp_path)) == {0, 1}


def test_written_forwards_keep_their_counts_and_let_go_of_their_rows(w: TraceWriter) -> None:
    f = forward(0)
    before = f.layers[0].routed_GE.copy()
    assert f.row_bytes > 0
    w.put(f)
    w.flush()
    assert f.row_bytes == 0
    np.testing.assert_array_equal(f.layers[0].routed_GE, before)


class Arriving:
    """A forward whose numbers come later."""

    def __init__(self, f: Forward) -> None:
        self.lost_rows = 0
        self.f = f
        self.resolved_on: threading.Thread | None = None

    @property
    def row_bytes(self) -> int:
        return self.f.row_bytes

    def drop_rows(self) -> None:
        self.f.drop_rows()
        self.lost_rows = self.f.lost_rows

    def resolve(self) -> Forward:
        self.resolved_on = threading.current_thread()
        return self.f


def test_numbers_still_on_their_way_are_awaited_on_the_writers_thread(tmp_path: Path) -> None:
    w = TraceWriter(tmp_path, new_meta(), queue_bytes=forward(0).row_bytes)
    staged = [Arriving(forward(0)), Arriving(forward(1, lengths=(9, 9)))]
    assert all(isinstance(s, StagedForward) for s in staged)
    for s in staged:
        w.put(s)
        w.flush()
        assert s.resolved_on is w._thread
    w.close()
    assert rows_of_steps(tmp_path) == {0: TOKENS * LAYERS}
    assert w.lost_rows == 18 * LAYERS
    assert sorted(routed(tmp_path)) == [0, 1]


# ---- a disk that refuses ------------------------------------------------------------------------


def test_a_refusing_disk_is_told_once_and_stops_nobody(
    w: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "QUEUE_EVENTS", 4)
    w.put(forward(0))
    w.flush()
    monkeypatch.setattr(w._store, "append", refuse)
    w.put(forward(1))
    with pytest.raises(TraceWriteError) as error:
        w.flush()
    text = str(error.value)
    assert text.startswith(f"cannot write the trace {w.run}: ")
    assert "No space left on device" in text
    assert "stays readable" in text
    assert isinstance(error.value.__cause__, OSError)
    assert w.failed is error.value
    for step in range(2, 22):  # more than the queue holds: nobody waits for ever
        w.put(forward(step))
    w.put(StepEnd(21))
    w.edit(lambda meta: meta.warnings.clear())
    with pytest.raises(TraceWriteError, match="No space left"):
        w.flush()
    with pytest.raises(TraceWriteError, match="No space left"):
        w.close()
    assert w.failed is error.value
    assert w.lost_forwards == 21
    assert not w._thread.is_alive()
    assert w._store._open == {}  # no file stays open
    assert routed(w.run) == {0: TOKENS * 2 * LAYERS}
    assert rows_of_steps(w.run) == {0: TOKENS * LAYERS}


def test_bytes_of_a_failed_writer_do_not_fill_its_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = TraceWriter(tmp_path, new_meta())
    monkeypatch.setattr(w._store, "append", refuse)
    for step in range(5):
        w.put(forward(step))
        with pytest.raises(TraceWriteError):
            w.flush()
    assert w._waiting_bytes == 0
    with pytest.raises(TraceWriteError):
        w.close()


def test_a_disk_that_refuses_at_the_end_leaves_the_open_streams(
    w: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    w.put(forward(0))
    w.flush()
    monkeypatch.setattr("moe_lens.trace.store.write_segment", refuse)
    with pytest.raises(TraceWriteError, match="No space left"):
        w.close()
    assert layout.streams(w.run, 0)
    assert routed(w.run) == {0: TOKENS * 2 * LAYERS}


def test_whatever_goes_wrong_on_the_thread_reaches_the_caller(w: TraceWriter) -> None:
    f = forward(0)
    f.layers[0].processed_GE = f.layers[0].processed_GE[:, :-1]
    w.put(f)
    with pytest.raises(TraceWriteError, match="broadcast"):
        w.flush()
    assert w.lost_forwards == 1


def test_flush_never_returns_before_the_failure_is_known(
    w: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    fail = w._fail

    def late(e: Exception) -> None:
        slow.wait(0.3)
        fail(e)

    monkeypatch.setattr(w, "_fail", late)
    monkeypatch.setattr(w._store, "append", refuse)
    w.put(forward(0))
    with pytest.raises(TraceWriteError):
        w.flush()


def test_what_was_appended_before_memory_ran_out_is_not_appended_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = TraceWriter(tmp_path, new_meta())
    append = w._store.append
    failed: list[str] = []

    def once(name: str, table: pa.Table) -> None:
        if name == "tokens" and not failed:
            failed.append(name)
            raise pa.ArrowMemoryError("malloc of size 1 failed")
        append(name, table)

    monkeypatch.setattr(w._store, "append", once)
    w.put(forward(0))
    with pytest.raises(TraceWriteError, match="malloc"):
        w.close()
    assert failed
    assert rows_of_steps(tmp_path) == {0: TOKENS * LAYERS}
    assert len(read_rows(tmp_path, "steps")) == 1
