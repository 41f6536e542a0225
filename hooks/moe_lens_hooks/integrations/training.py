"""What the callbacks of all trainers do: one recording, its steps numbered as the trainer counts.

Step n of the trace is the n-th optimizer step. What runs between it and the next one (an
evaluation, a generation) is recorded as further forwards of step n, with the phase that they have.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from moe_lens_hooks.recorder import Recorder


class _NothingToDo(Exception):
    """Ends a step in which nothing has to run."""


class TrainingRecording:
    """The recording of one training, from `open` to `close`; between trainings it does nothing.

    Args:
        path: Folder of the trace.
        scalars: Names of the scalars to log (see `scalars_of`), or all, or none of them.
        options: As for `Recorder`. A recording must not end a training: unless these say otherwise,
            breaches and a disk that refuses are warned of.
    """

    def __init__(
        self, path: str | Path, scalars: bool | Collection[str], options: dict[str, Any]
    ) -> None:
        self.recorder: Recorder | None = None
        self._path = Path(path)
        self._scalars = scalars
        self._options = {"on_breach": "warn", "on_write_error": "warn"} | options
        self._resumed = False
        self._open: AbstractContextManager[None] | None = None
        self._waiting = False

    def open(self, model: nn.Module, *, resumed: bool) -> None:
        """Attach to the model.

        Args:
            model: Before its first compiled forward.
            resumed: The training goes on from a checkpoint, and so does the trace, if it is there.

        Raises:
            NoMoELayers, UnsupportedRouter, TraceError, …: As `Recorder` does.
        """
        if self.recorder is not None:  # an exception ended the training before
            self.close()
            resumed = True
        options: dict[str, Any] = {"resume": resumed} | self._options
        self.recorder = Recorder(model, self._path, **options)
        self._resumed = options["resume"]

    def wait(self, done: int) -> None:
        """Whatever runs before the first training step, if anything does, is of step 0.

        In a training that was resumed it is of that first step: the one before it stays as it was
        recorded.

        Args:
            done: Optimizer steps that are done.
        """
        self._enter(done + 1 if self._resumed else done)
        self._waiting = True

    def begin(self, done: int) -> None:
        """The training step that follows begins.

        Args:
            done: Optimizer steps that are done.
        """
        self._enter(done + 1)

    def end(self) -> None:
        """What has begun is over; until the next step, what runs is of this one too.

        Raises:
            CaptureBreach, TraceWriteError: If the options ask for them.
        """
        step, self._open = self._open, None
        waiting, self._waiting = self._waiting, False
        if step is None:
            return
        if waiting:  # that nothing ran is no breach, as where an exception ended the step
            with suppress(_NothingToDo):
                step.__exit__(_NothingToDo, _NothingToDo(), None)
        else:
            step.__exit__(None, None, None)

    def _enter(self, number: int) -> None:
        self.end()
        if self.recorder is not None:
            self._open = self.recorder.step(number=number)
            self._open.__enter__()

    def scalars(self) -> dict[str, float]:
        """The numbers of the last step, as far as they are wanted."""
        if self.recorder is None or not self._scalars:
            return {}
        found = self.recorder.scalars()
        if self._scalars is True:
            return found
        return {k: v for k, v in found.items() if k.rpartition("/")[2] in self._scalars}

    def close(self, error: BaseException | None = None) -> None:
        """Detach from the model and seal the trace.

        Args:
            error: What ended the training early; noted in the trace.
        """
        self.end()
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close(error)
