"""What is looked at, and noted in the trace, when a recording ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from moe_lens.errors import TraceWriteError
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Meta
from moe_lens.trace.writer import TraceWriter
from moe_lens_hooks.watch import Watch

Change = Callable[[Meta], None]


def look_for_edits(edited: Callable[[], list[str]], watch: Watch) -> None:
    """Was the model edited since the hooks were attached? Each edit is a breach.

    Args:
        edited: Says what is not as it was.
        watch: Takes the breaches.
    """
    try:
        found = edited()
    except Exception as e:  # an adapter looks at what the model has become
        found = [f"the model cannot be looked at any more ({type(e).__name__}: {e})"]
    for text in found:
        watch.breach(text)


def ended(never: list[str], error: BaseException | None) -> Change:
    """The change of the meta file with which an attempt ends.

    Args:
        never: Paths of MoE blocks that never ran.
        error: What ended it early.
    """

    def change(meta: Meta) -> None:
        meta.never_entered = never
        last = meta.attempts[-1]
        last.end = "closed" if error is None else "failed"
        last.error = None if error is None else f"{type(error).__name__}: {error}"
        last.ended_ns = time.time_ns()

    return change


def close_writer(writer: TraceWriter, lock: RankLock, *, raises: bool) -> None:
    """Write everything and let go of the trace.

    Raises:
        TraceWriteError: The disk refused, and it is to be raised.
    """
    try:
        writer.close()
        lock.release()  # not where Ctrl-C came first: the writer is still at work
    except TraceWriteError:
        lock.release()
        if raises:
            raise


def at_close(path: Path, never: list[str], skipped: int, *, unused: bool) -> str | None:
    """What a user is told of a recording that ended well; None: nothing.

    Args:
        path: The trace.
        never: Paths of MoE blocks that never ran.
        skipped: Forwards that ran while it was paused.
        unused: None ran while it was not.
    """
    if unused:
        return (
            f"nothing was recorded into {path}: the recorder was paused whenever the model ran "
            f"({skipped} forwards). rec.start() begins recording"
        )
    when = " while recording was on" if skipped else ""
    return f"{len(never)} MoE blocks never ran{when}, {never[0]} first" if never else None
