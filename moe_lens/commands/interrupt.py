"""Ctrl-C during a query."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process, as the shell's 130.

    DuckDB looks for a KeyboardInterrupt only between pieces of work, which can take minutes. What
    only reads has nothing to put in order, so the system may end it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
