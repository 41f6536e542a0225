"""One writer per rank of a trace: a lock that ends with its process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from moe_lens.errors import TraceLocked
from moe_lens.trace.layout import lock_path

_held: set[Path] = set()
"""Locks of this process: POSIX locks do not exclude their own process."""


class RankLock:
    """Exclusive right to write one rank of a trace.

    A POSIX record lock (lockf): the kernel drops it when the process dies, and a forked child (a
    data loader's worker) does not inherit it.

    Raises:
        TraceLocked: A living process writes this rank.
        OSError: The lock file cannot be made, written or locked.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.path = lock_path(run, rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path = self.path.resolve()  # one trace, however its path is spelled
        if self.path in _held:
            raise TraceLocked(
                f"{run} (rank {rank}) is being written by this very process; "
                "close that recorder first."
            )
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                self._file.close()
                raise  # not held by anybody: a file system without locks, say
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise TraceLocked(
                f"{run} (rank {rank}) is being written by process {holder}. Reading it is fine; "
                "to recover or resume it, wait for that process to end or stop it."
            ) from e
        _held.add(self.path)
        try:
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back. Its file stays: removing it would race with the next holder."""
        if not self._file.closed:
            _held.discard(self.path)
            self._file.truncate(0)
            self._file.close()
