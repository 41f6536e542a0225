"""A run that is written while it is read: no read fails, and what was seen stays seen."""

from __future__ import annotations

import threading
from pathlib import Path

from support.traces import arrow, meta, segment, stream

from moe_lens.queries.session import open_trace
from moe_lens.trace import layout
from moe_lens.trace.meta import write_meta

READS = 100
SEGMENTS = 100


def write_until(run: Path, stop: threading.Event, written: list[int]) -> None:
    """Append to the open stream; after every fifth batch seal it as the format says."""
    seq = step = 0
    while not stop.is_set() and seq < SEGMENTS:
        batches = []
        path = layout.stream_path(run, "steps", 0, seq)
        for _ in range(5):
            row = {"step": step, "window": step, "tokens": 1}
            if not batches:
                stream(run, "steps", [row], seq=seq)
            else:
                message = arrow("steps", [row]).to_batches()[0].serialize().to_pybytes()
                with path.open("ab") as f:
                    f.write(message[:50])  # torn for a moment
                    f.flush()
                    f.write(message[50:])
            batches.append(row)
            step += 1
            written[0] = step
        segment(run, "steps", batches, seq=seq)
        path.unlink()
        seq += 1
        stop.wait(0.01)


def test_reading_while_a_writer_works(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    stop, written = threading.Event(), [0]
    writer = threading.Thread(target=write_until, args=(tmp_path, stop, written))
    writer.start()
    try:
        with open_trace(tmp_path) as trace:
            last = 0
            for _ in range(READS):
                before = written[0]
                trace.refresh()
                (answer,) = trace.sql(
                    "select count(*) as n, count(distinct step) as steps from steps"
                ).rows()
                assert answer["n"] == answer["steps"]  # nothing twice
                # Nothing lost: `before` may count one batch whose last bytes are on their way.
                assert answer["n"] >= max(last, before - 1)
                last = answer["n"]
    finally:
        stop.set()
        writer.join()
    assert last > 5
