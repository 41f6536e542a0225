"""How do runs share a machine? One process each at a time, on one thread, as many as asked for.

A student is small: two threads of one training wait for each other longer than they compute. What
is finished is handed over at once, so that an interruption costs only what is running.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from moe_lens.errors import LabError
from moe_lens.granularity.runs import Row, Run, execute
from moe_lens.granularity.train import Recipe

OnProgress = Callable[[Run, int], None]
"""Called with a run and how many of its steps are done, now and then."""

_SAY_EVERY = 0.25
_TO_LEAVE = 5.0


def executed(
    runs: Sequence[Run],
    recipe: Recipe,
    *,
    workers: int = 1,
    device: str = "cpu",
    on_progress: OnProgress = lambda run, done: None,
) -> Iterator[Row]:
    """Train all students and yield each one's row when it is finished.

    Args:
        runs: What to train, in this order.
        recipe: How long and how.
        workers: Processes. 1: this one does it, with the threads that torch has. Otherwise the
            caller's main module is imported by each of them, so a script needs the usual
            `if __name__ == "__main__":`.
        device: "cpu" or a CUDA device.
        on_progress: See `OnProgress`.

    Raises:
        LabError: A process died, or torch refused (no memory, no such device).
    """
    if workers < 1:
        raise LabError(f"training takes at least 1 process, got {workers} workers.")
    if min(workers, len(runs)) <= 1:
        for run in runs:
            yield _executed(run, recipe, device, _Counted(partial(on_progress, run)))
        return
    yield from _in_processes(runs, recipe, min(workers, len(runs)), device, on_progress)


def _executed(run: Run, recipe: Recipe, device: str, counted: _Counted) -> Row:
    """As `execute`; what torch refuses is one line that names the student."""
    try:
        return execute(run, recipe, device, counted)
    except torch.OutOfMemoryError as e:
        raise LabError(
            f"{run.name}: no memory left on {device}. What finished is kept: run it again to go "
            "on, with fewer --workers or a smaller hidden size."
        ) from e
    except RuntimeError as e:
        raise LabError(f"{run.name}: {str(e).splitlines()[0]}") from e


class _Counted:
    """Counts steps, and says so a few times a second."""

    def __init__(self, say: Callable[[int], None]) -> None:
        self.say, self.done, self.said = say, 0, time.monotonic()

    def __call__(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= _SAY_EVERY:
            self.said = now
            self.say(self.done)


def _in_processes(
    runs: Sequence[Run], recipe: Recipe, workers: int, device: str, on_progress: OnProgress
) -> Iterator[Row]:
    # A forked process could not use torch's threads or CUDA.
    spawn = multiprocessing.get_context("spawn")
    waiting = list(reversed(runs))
    processes: dict[Connection, BaseProcess] = {}
    doing: dict[Connection, Run] = {}
    try:
        for _ in range(workers):
            ours, theirs = spawn.Pipe()
            processes[ours] = spawn.Process(
                target=_work, args=(theirs, recipe, device), daemon=True
            )
            processes[ours].start()
            theirs.close()  # so that the end of the process is the end of the pipe
            doing[ours] = waiting.pop()
            ours.send(doing[ours])
        while doing:
            for pipe in wait(list(doing)):
                assert isinstance(pipe, Connection)
                try:
                    said = pipe.recv()
                except (EOFError, ConnectionResetError) as e:
                    processes[pipe].join(_TO_LEAVE)
                    raise LabError(
                        f"the process that trained {doing[pipe].name} died (exit code "
                        f"{processes[pipe].exitcode}). What finished is kept: run it again to go "
                        "on, with fewer --workers if memory ran out."
                    ) from e
                if isinstance(said, int):
                    on_progress(doing[pipe], said)
                    continue
                if isinstance(said, Exception):
                    raise said
                del doing[pipe]
                if waiting:
                    doing[pipe] = waiting.pop()
                    pipe.send(doing[pipe])
                yield said
    finally:
        for pipe in processes:
            pipe.close()
        for process in processes.values():
            # One that trains notices at its next word; one that waits for work, at once.
            process.join(_TO_LEAVE)
            process.terminate()


def _work(pipe: Connection, recipe: Recipe, device: str) -> None:
    """A process: run by run, until nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    try:
        while True:
            run = pipe.recv()
            try:
                said: object = _executed(run, recipe, device, _Counted(pipe.send))
            except LabError as e:
                said = e
            pipe.send(said)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
