"""`MoeLensCallback` for the Trainer of transformers.

trainer = Trainer(model, args, ..., callbacks=[MoeLensCallback("traces/run1")])
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from moe_lens_hooks.integrations.training import TrainingRecording


class MoeLensCallback(TrainerCallback):
    """Records a training, and logs numbers of its routing with the Trainer's own.

    Step n of the trace is the Trainer's global step n, with all its micro-batches; an evaluation
    after it is recorded in step n too, with phase "eval". What is logged is of the last optimizer
    step and of this process alone. A training that goes on from a checkpoint goes on with the
    trace.

    Args:
        path: Folder of the trace, one for each training; every process records its rank.
        scalars: Log `rec.scalars()` whenever the Trainer logs its loss: all (True), none, or those
            with these names, as `("load_max_over_mean", "entropy")`.
        options: As for `moe_lens.record`; `on_breach` and `on_write_error` are "warn" here.

    Raises:
        NoMoELayers, UnsupportedRouter, TraceError: When the training begins.
    """

    def __init__(
        self, path: str | Path, *, scalars: bool | Collection[str] = True, **options: Any
    ) -> None:
        self._training = TrainingRecording(path, scalars, options)
        self._fresh = False
        """A training step has ended, and nothing ran or was logged since."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        self._come_first()
        # Whatever compiles the model does so in its first forward, which is still to come.
        self._training.open(model, resumed=state.global_step > 0)
        self._training.wait(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._fresh = False
        self._training.begin(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training.end()
        self._fresh = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._fresh = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._fresh or logs is None or "loss" not in logs:
            return
        self._fresh = False
        scalars = self._training.scalars()
        logs |= scalars  # for the loggers, which are called after us
        state.log_history[-1] |= scalars

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the recording.

        The Trainer tells no callback of an exception: where one ended the training and the process
        goes on, call this. Otherwise the trace is closed when the process ends, or when this
        callback's next training begins, which is taken for another attempt at the same one.
        """
        self._training.close()

    def _come_first(self) -> None:
        """Stand before the loggers in the Trainer's list, so that they see what `on_log` adds.

        The Trainer puts the callbacks of its loggers first and hands its list to nobody, so the
        handler that is calling us is asked for.
        """
        frame = inspect.currentframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler):
                handler.callbacks.remove(self)
                handler.callbacks.insert(0, self)
                return
            frame = frame.f_back
