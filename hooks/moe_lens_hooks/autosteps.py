"""A recorder whose steps nobody states: the model's optimizer does, or each forward is one.

Once an optimizer holds parameters of the model, a step is what lies between two of its steps, so
that the micro-batches of gradient accumulation are forwards of one step. Forwards in eval mode, and
those of a model that no optimizer holds, are steps of their own.
"""

from __future__ import annotations

import gc
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim import Optimizer

from moe_lens.errors import MoeLensError
from moe_lens.trace.meta import Meta
from moe_lens_hooks.recorder import Recorder

PATIENCE = 64
"""Forwards of a first training step after which its optimizer is not waited for: it makes no steps,
or compiled ones, which are not seen."""


class AutoRecorder(Recorder):
    """Records a model in a script that knows nothing of recording.

    Args:
        root: The module whose forwards are recorded.
        path: Folder of the trace.
        options: As for `Recorder`.
    """

    def __init__(self, root: nn.Module, path: Path, **options: Any) -> None:
        super().__init__(root, path, **options)
        self._root = root
        self._mine: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._own = any(self._holds(optimizer) for optimizer in _optimizers())
        self._optimized = self._own
        self._stepped = False
        self._open: AbstractContextManager[None] | None = None

    def before_forward(self) -> None:
        """The root, or a part of it, is about to run."""
        training = self._root.training
        if not self._stepped and len(self._of_step) + self._skipped >= PATIENCE:
            self._optimized = False
            self.end_step()
        if not training:
            self.end_step()
        if self._open is None and training and self._optimized and torch.is_grad_enabled():
            self._open = self.step()
            self._open.__enter__()

    def optimizer_stepped(self, optimizer: Optimizer) -> None:
        """An optimizer made a step: it ends ours, unless it trains something else.

        An optimizer that holds no parameter of the model may still train it, through copies of its
        own (sharded or in float32). That is believed as long as none is known that does hold some.
        """
        if optimizer not in self._mine:
            self._own |= self._holds(optimizer)
        if self._mine[optimizer] or not self._own:
            self._optimized = self._stepped = True
            self.end_step()

    def end_step(self) -> None:
        """End the training step, if one is open."""
        step, self._open = self._open, None
        if step is not None:
            step.__exit__(None, None, None)

    def close(self, error: BaseException | None = None) -> None:
        self.end_step()
        super().close(error)

    def _holds(self, optimizer: Optimizer) -> bool:
        """The optimizer has parameters of the model; remembered."""
        ours = {id(p) for p in self._root.parameters()}
        held = (id(p) for group in optimizer.param_groups for p in group["params"])
        self._mine[optimizer] = any(p in ours for p in held)
        return self._mine[optimizer]


class Recording:
    """The trace of one model.

    It does not keep the model alive: it has its recorder weakly, and what must be closed when both
    are gone.
    """

    def __init__(self, recorder: AutoRecorder, layers: int) -> None:
        meta = recorder._writer.meta
        self.path = recorder.path
        self.rank, self.world = meta.rank, meta.world
        self._recorder = ref(recorder)
        self._writer, self._lock = recorder._writer, recorder._lock
        self._closed = False

    @property
    def recorder(self) -> AutoRecorder | None:
        """None once the trace is closed, or the model was garbage collected."""
        return None if self._closed else self._recorder()

    def close(self, error: BaseException | None) -> list[str]:
        """Write everything and seal the trace; what a user should know about it."""
        if self._closed:
            return []
        recorder, self._closed = self._recorder(), True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if recorder is not None:
                    recorder.close(error)
                else:  # every forward that it saw is with the writer
                    self._writer.edit(_closed)
                    self._writer.close()
            except MoeLensError as e:
                return [str(e)]
            finally:
                self._lock.release()
        return [str(w.message) for w in caught]


def _closed(meta: Meta) -> None:
    meta.attempts[-1].end, meta.attempts[-1].ended_ns = "closed", time.time_ns()


def _optimizers() -> list[Optimizer]:
    """Those that exist now. They keep no register, so the garbage collector is asked."""
    return [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]
