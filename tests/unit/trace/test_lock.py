"""The lock: one living writer a rank, found out by processes of its own and of others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_lens.errors import TraceError, TraceLocked
from moe_lens.trace.layout import lock_path
from moe_lens.trace.lock import RankLock

HOLD = """
import os, sys, time
from pathlib import Path
from moe_lens.trace.lock import RankLock
lock = RankLock(Path(sys.argv[1]), 0)
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
else:
    print(os.getpid(), flush=True)
time.sleep(60)
"""

TRY = """
import sys
from pathlib import Path
from moe_lens.errors import TraceLocked
from moe_lens.trace.lock import RankLock
try:
    RankLock(Path(sys.argv[1]), 0)
except TraceLocked as e:
    print(e)
"""


@contextmanager
def holder(run: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock, and the number that it printed."""
    command = [sys.executable, "-c", HOLD, str(run), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def tried_elsewhere(run: Path) -> str:
    """What another process is told that wants the lock; empty: it got it."""
    command = [sys.executable, "-c", TRY, str(run)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_second_writer_of_this_process_is_refused(tmp_path: Path) -> None:
    lock = RankLock(tmp_path, 0)
    with pytest.raises(TraceLocked, match="by this very process; close that recorder first"):
        RankLock(tmp_path, 0)
    lock.release()
    RankLock(tmp_path, 0).release()


def test_a_refused_writer_does_not_cost_the_first_its_lock(tmp_path: Path) -> None:
    lock = RankLock(tmp_path, 0)
    with pytest.raises(TraceLocked):
        RankLock(tmp_path, 0)
    assert f"process {os.getpid()}." in tried_elsewhere(tmp_path)
    lock.release()
    assert tried_elsewhere(tmp_path) == ""


@pytest.mark.parametrize("spelled", ["dots", "symlink"])
def test_another_spelling_of_the_path_is_the_same_trace(tmp_path: Path, spelled: str) -> None:
    run = tmp_path / "run"
    lock = RankLock(run, 0)
    other = run / ".." / "run"
    if spelled == "symlink":
        other = tmp_path / "link"
        other.symlink_to(run)
    try:
        with pytest.raises(TraceLocked):
            RankLock(other, 0).release()
    finally:
        lock.release()


def test_a_relative_path_is_the_same_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RankLock(tmp_path / "run", 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceLocked):
        RankLock(Path("run"), 0)
    lock.release()


def test_ranks_and_runs_do_not_exclude_each_other(tmp_path: Path) -> None:
    locks = [RankLock(tmp_path / "a", 0), RankLock(tmp_path / "a", 1), RankLock(tmp_path / "b", 0)]
    for lock in locks:
        lock.release()


def test_a_writer_in_another_process_is_named_by_its_pid(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, pid):
        assert pid == process.pid
        with pytest.raises(TraceLocked) as error:
            RankLock(tmp_path, 0)
        text = str(error.value)
        assert f"{tmp_path} (rank 0) is being written by process {pid}." in text
        assert "Reading it is fine" in text
        assert isinstance(error.value, TraceError)
        RankLock(tmp_path, 1).release()


def test_death_releases_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        with pytest.raises(TraceLocked):
            RankLock(tmp_path, 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock = RankLock(tmp_path, 0)
    assert f"process {os.getpid()}." in tried_elsewhere(tmp_path)
    lock.release()


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (process, child):
        try:
            with pytest.raises(TraceLocked, match=f"process {process.pid}"):
                RankLock(tmp_path, 0)
            process.kill()
            process.wait()
            os.kill(child, 0)  # the child lives
            RankLock(tmp_path, 0).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_released_lock_names_nobody_and_leaves_its_file(tmp_path: Path) -> None:
    lock = RankLock(tmp_path, 0)
    path = lock_path(tmp_path, 0)
    assert path.read_text() == f"{os.getpid()}\n"
    # (Reading it above dropped the lock, as closing any handle on it does: nobody else does that.)
    lock.release()
    lock.release()
    assert path.read_text() == ""
