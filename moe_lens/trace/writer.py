"""The trace writer: a thread that turns what capture saw into tables on disk.

The model's thread hands over events and goes on. Counts are never lost; per-token rows may be, a
whole forward at a time, when the writer falls behind, and `steps.lost_rows` says so.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from moe_lens.errors import TraceWriteError
from moe_lens.trace import rows
from moe_lens.trace.events import Event, Forward, Losses, Outcomes, Staged, StagedForward
from moe_lens.trace.invariants import check
from moe_lens.trace.meta import Meta
from moe_lens.trace.store import SEAL_ROWS, SEAL_SECONDS, TraceStore
from moe_lens.trace.tables import window_tables
from moe_lens.trace.windows import Window

QUEUE_BYTES = 256 << 20
"""Per-token rows waiting for the writer above which those of a new forward are given up."""

QUEUE_EVENTS = 4096
"""Events waiting above which the caller waits: counts are never given up."""

LAID_WINDOWS = 64
"""Closed windows that are laid out as rows at most at once: they take many times their memory."""

TURN_SECONDS = 5.0
"""How often the writer looks at what is waiting. Forwards one at a time, each between two of a
model that has the processor's caches to itself, would cost twice as much."""


@dataclass
class _Flush:
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Edit:
    """A change of the meta file, made on the writer's thread."""

    change: Callable[[Meta], object]


_Item = Staged | _Flush | _Edit


class TraceWriter:
    """Writes one rank of a trace on a thread of its own.

    Args:
        run: Folder of the trace; the caller holds the rank's lock.
        meta: Description of the rank; the writer's alone from here on (`edit` changes it).
        first_window: Number of the first window.
        queue_bytes: Bound on per-token rows in memory.
        seal_rows, seal_seconds, max_bytes: As in `TraceStore`.
    """

    def __init__(
        self,
        run: Path,
        meta: Meta,
        *,
        first_window: int = 0,
        queue_bytes: int = QUEUE_BYTES,
        seal_rows: int = SEAL_ROWS,
        seal_seconds: float = SEAL_SECONDS,
        max_bytes: int | None = None,
    ) -> None:
        self.run = run
        self.meta = meta
        self.failed: TraceWriteError | None = None
        self.breaches: deque[str] = deque(maxlen=100)
        self.breach_count = 0
        self.lost_rows = 0
        self.lost_forwards = 0
        """Forwards that came after the writer had failed."""
        self._store = TraceStore(
            run, meta, seal_rows=seal_rows, seal_seconds=seal_seconds, max_bytes=max_bytes
        )
        self._attempt = meta.attempts[-1].attempt
        self._next_window = first_window
        self._window: Window | None = None
        self._last: Window | None = None  # the window closed last
        self._closed: list[Window] = []
        self._steps: list[rows.Step] = []
        """Windows and forwards whose rows are not appended yet."""
        self._queue_bytes = queue_bytes
        self._events: deque[_Item] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._urgent = False
        """Something waits that must not wait for the writer's next turn."""
        # The first array makes pyarrow load pandas and its compute functions, half a second of CPU:
        # now, not beside the model's first step.
        pa.array([0]).cast(pa.int32())
        self._thread = threading.Thread(target=self._work, name="moe_lens writer", daemon=True)
        self._thread.start()

    def put(self, event: _Item) -> None:
        """Hand over one event. Waits only while thousands of events are waiting already."""
        with self._changed:
            if self._closing:
                raise TraceWriteError(f"the recording into {self.run} is closed")
            if isinstance(event, StagedForward):
                size = event.row_bytes
                if size and self._waiting_bytes + size > self._queue_bytes:
                    event.drop_rows()
                    self.lost_rows += event.lost_rows
                    size = 0
                self._waiting_bytes += size
            while len(self._events) >= QUEUE_EVENTS and not self._closing:
                self._changed.wait()
            if self._ended:
                raise TraceWriteError(f"the recording into {self.run} was closed meanwhile")
            self._events.append(event)
            self._urgent |= isinstance(event, _Flush) or self._much()
            if self._urgent:
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Events not yet written."""
        return len(self._events)

    def take_breaches(self) -> list[str]:
        """Breaches found since the last call (the newest hundred)."""
        found = []
        while self.breaches:
            found.append(self.breaches.popleft())
        return found

    def edit(self, change: Callable[[Meta], object]) -> None:
        """Change the meta file, in order with the events."""
        self.put(_Edit(change))

    def flush(self) -> None:
        """Return when all that was handed over, open windows included, would survive `kill -9`.

        Raises:
            TraceWriteError: The disk refused, now or earlier.
        """
        request = _Flush()
        self.put(request)
        request.done.wait()
        if self.failed is not None:
            raise self.failed

    def close(self) -> None:
        """Write everything, seal it, end the thread.

        Raises:
            TraceWriteError: The disk refused, now or earlier.
        """
        with self._changed:
            self._closing = self._urgent = True
            self._changed.notify_all()
        self._thread.join()
        if self.failed is not None:
            raise self.failed

    def _much(self) -> bool:
        """An eighth of what may wait is waiting."""
        return 8 * len(self._events) > QUEUE_EVENTS or 8 * self._waiting_bytes > self._queue_bytes

    def _work(self) -> None:
        while True:
            with self._changed:
                # Without anything new, too: for windows and segments whose time has come.
                self._changed.wait_for(lambda: self._urgent, timeout=TURN_SECONDS)
                self._urgent = self._closing
                batch = list(self._events)
                self._events.clear()
                ending = self._ended = self._closing and not batch
                self._changed.notify_all()
            self._handle(batch)
            if ending:
                self._finish()
                return

    def _fail(self, e: Exception) -> None:
        what = "cannot write the trace" if isinstance(e, OSError) else "recording failed in"
        reason = e if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        self.failed = TraceWriteError(
            f"{what} {self.run}: {reason}. Recording has stopped; "
            "what was written before stays readable."
        )
        self.failed.__cause__ = e
        self._store.abandon()

    def _handle(self, batch: list[_Item]) -> None:
        out: dict[str, list[pa.Table]] = {}
        forwards = [e for e in batch if isinstance(e, StagedForward)]
        sizes = sum(e.row_bytes for e in forwards)
        edited = False
        try:
            for event in batch:
                if self.failed is not None:
                    self.lost_forwards += isinstance(event, StagedForward)
                elif isinstance(event, _Flush):
                    self._close_window(out)
                    self._append(out)
                    self._store.sync()
                    self._store.save_meta()
                elif isinstance(event, _Edit):
                    event.change(self.meta)
                    edited = True  # saved once for the whole batch: a save waits for the disk
                else:
                    self._take(event.resolve(), out)
            if self.failed is None:
                if self._window is not None and not self._window.alone and self._window.expired():
                    self._close_window(out)
                if edited:
                    self._store.save_meta()
                self._append(out)
                self._store.seal_old()
        except Exception as e:  # whatever it is, the model's thread must hear of it
            self.lost_forwards += len(forwards)
            if not isinstance(e, OSError):  # the disk is well: keep what the batch had before this
                with suppress(Exception):
                    self._close_window(out)
                    self._append(out)
            self._fail(e)
        finally:
            with self._changed:
                self._waiting_bytes -= sizes
            for event in batch:
                if isinstance(event, _Flush):
                    event.done.set()

    def _take(self, event: Event, out: dict[str, list[pa.Table]]) -> None:
        if isinstance(event, Forward):
            self._forward(event, out)
        elif isinstance(event, Losses):
            self._losses(event, out)
        elif isinstance(event, Outcomes):
            out.setdefault("outcomes", []).append(rows.outcome_table(event, self._attempt))
        elif self._window is not None and self._window.alone:
            self._close_window(out)

    def _forward(self, forward: Forward, out: dict[str, list[pa.Table]]) -> None:
        found = check(forward)
        self.breaches.extend(found)
        self.breach_count += len(found)
        self._note(forward)
        attempt = self.meta.attempts[-1]
        if attempt.first_step is None:
            attempt.first_step = forward.step
            self._store.save_meta()
        if self._window is not None and not self._window.takes(forward):
            self._close_window(out)
        if self._window is None:
            self._window = Window(self._next_window, self._attempt, forward)
            self._next_window += 1
        self._window.add(forward)
        number = self._window.number
        add = out.setdefault
        parts = forward.parts or [forward]
        self._steps += [(f, number, 0 if i else len(found)) for i, f in enumerate(parts)]
        exact = self.meta.weights == "exact"
        add("routing", []).extend(rows.routing_tables(forward, self._attempt, exact=exact))
        add("logits", []).extend(rows.logit_tables(forward, self._attempt))
        add("tokens", []).extend(rows.token_tables(forward, self._attempt))
        if any(f.sequences for f in parts):
            table = self._store.tables["sequences"]
            add("sequences", []).append(rows.sequence_table(forward, self._attempt, table))
        forward.forget_rows()  # whoever still holds the forward wants its counts

    def _note(self, forward: Forward) -> None:
        """Count what a library is known to do; the file is written when something is new."""
        warnings, new = self.meta.warnings, False
        for layer in forward.layers:
            for text, n in layer.notes.items():
                new |= text not in warnings
                warnings[text] = warnings.get(text, 0) + n
        if new:
            self._store.save_meta()

    def _losses(self, losses: Losses, out: dict[str, list[pa.Table]]) -> None:
        if self._window is None:
            # The window was closed by a flush between the forward and its losses: sums merge, so
            # the losses go into further rows of the same window.
            assert self._last is not None  # there are losses of forwards only
            self._window = self._last.emptied()
        self._window.add_losses(losses)
        out.setdefault("outcomes", []).append(rows.loss_table(losses, self._attempt))

    def _close_window(self, out: dict[str, list[pa.Table]]) -> None:
        if self._window is None:
            return
        self._last = self._window
        self._closed.append(self._window)
        self._window = None
        if len(self._closed) >= LAID_WINDOWS:
            self._append(out)

    def _append(self, out: dict[str, list[pa.Table]]) -> None:
        if self._closed:
            out |= {name: [table] for name, table in window_tables(self._closed).items()}
        if self._steps:
            out["steps"] = [rows.step_rows(self._steps, self._attempt)]
        self._closed, self._steps = [], []
        for name in list(out):
            tables = out.pop(name)  # first: should this fail, it must not be appended once more
            if tables:
                self._store.append(name, pa.concat_tables(tables))

    def _finish(self) -> None:
        if self.failed is not None:
            return
        out: dict[str, list[pa.Table]] = {}
        try:
            self._close_window(out)
            self._append(out)
            self._store.close()
        except Exception as e:
            self._fail(e)
