"""Finds the MoE models of a script that knows nothing of recording, and records each of them.

`nn.Module.__call__` is wrapped while a `Watcher` watches: a module that is called for the first
time is looked at, with all that is in it, and a recorder is attached before its forward begins. (A
global forward pre-hook would not do: hooks that it adds are not seen by the call in progress, it is
not given keyword arguments, and torch.compile warns of it.)

Nothing here raises into the script. Models are not kept alive: what holds a recorder are the hooks
on its model.
"""

from __future__ import annotations

import atexit
import gc
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import KeyedRef, WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_lens.errors import MoeLensError, NoMoELayers
from moe_lens_hooks.adapter import Adapter, MoELayer
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.autosteps import AutoRecorder, Recording
from moe_lens_hooks.capture import _recorded
from moe_lens_hooks.finding import find_layers
from moe_lens_hooks.opening import rank_and_world
from moe_lens_hooks.parts import parts_of

_UNSEEN: Any = object()


class Watcher:
    """Watches which modules are called in this process, and records the MoE models among them.

    Args:
        folder: Each model's trace is a folder in it, named after the model's class.
        say: Told what a user should know, a line at a time.
        options: As for `Recorder`.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], **options: Any) -> None:
        self.recordings: list[Recording] = []
        self.refused: list[str] = []
        """Why a model was not recorded, though it routes."""
        self._folder = folder
        self._say = say
        self._options = options
        self._lock = threading.RLock()
        self._adapters: list[Adapter] = []
        self._states: dict[int, Recording | None] = {}
        """By id of each module that was looked at: the recording whose forwards it may begin."""
        self._alive: dict[int, KeyedRef[int, nn.Module]] = {}
        self._called: WeakSet[nn.Module] = WeakSet()
        """Modules that were looked at because they were called: they stood in no other of these."""
        self._names: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def watch(self) -> None:
        """Begin, in all threads of this process."""
        original, states, tracing = nn.Module.__call__, self._states, torch.compiler.is_compiling

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # While torch.compile traces, nothing of us ends up in the graph. Most modules are
            # known to begin nothing: for them this must be quick.
            if not tracing() and states.get(id(module), _UNSEEN) is not None:
                self._before(module)
            return original(module, *args, **kwargs)

        _keep_out_of_graphs(__call__, Watcher._before)
        nn.Module.__call__ = __call__  # type: ignore[method-assign]
        stepped = register_optimizer_step_post_hook(self._optimizer_stepped)

        def unwrap() -> None:
            nn.Module.__call__ = original  # type: ignore[method-assign]

        self._undo = [unwrap, stepped.remove]
        os.register_at_fork(after_in_child=self._forget_in_child)

    def stop(self) -> None:
        """Look at no further module; recordings go on."""
        for undo in self._undo:
            undo()
        self._undo = []

    def finish(self, error: BaseException | None = None) -> None:
        """End every recording.

        Args:
            error: What ended the script; noted in the traces.
        """
        self.stop()
        for recording in self.recordings:
            self._close(recording, error)

    # -- what the wrapped call and the hooks call ------------------------------------------------

    def _before(self, module: nn.Module) -> None:
        state = self._states.get(id(module), _UNSEEN)
        if state is _UNSEEN:
            state = self._look(module)
        recorder = None if state is None else state.recorder
        if recorder is not None:
            recorder.before_forward()

    def _optimizer_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled step: what is traced here would not run again
        for recording in self.recordings:
            recorder = recording.recorder
            if recorder is not None:
                recorder.optimizer_stepped(optimizer)

    def _forget_in_child(self) -> None:
        """A forked process is not recorded; the recorders detach themselves."""
        self.stop()
        self.recordings = []

    # -- looking at modules ----------------------------------------------------------------------

    def _look(self, module: nn.Module) -> Recording | None:
        if getattr(module, "_is_replica", False):  # of DataParallel, one for each call
            return None
        with self._lock:
            try:
                self._find(module)
            except NoMoELayers:
                pass  # dense
            except MoeLensError as e:
                self._refuse(str(e))
            except Exception as e:  # whatever it is, it must not end the script
                self._refuse(f"{type(module).__name__}: {type(e).__name__}: {e}")
            self._called.add(module)
            for m in module.modules():
                if id(m) not in self._states:
                    self._remember(m, None)
            return self._states[id(module)]

    def _find(self, module: nn.Module) -> None:
        """Attach a recorder to the model that `module` is or belongs to, if there is one.

        Raises:
            NoMoELayers: It is dense.
            UnsupportedRouter, TraceError: It cannot be recorded.
        """
        self._adapters = self._adapters or all_adapters()
        layers = find_layers([module], self._adapters)
        if all(x.block in _recorded for x in layers):
            return  # a wrapper of a model that is recorded already
        root = self._whole(module, layers)
        layers = find_layers([root], self._adapters)
        blocks = {x.block for x in layers}
        for earlier in self.recordings:
            recorder = earlier.recorder
            if recorder is None or not blocks.isdisjoint(x.block for x in recorder._layers):
                self._close(earlier, None)  # a part of this one, or its model is gone
        path = self._folder / self._name(root)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorder = AutoRecorder(root, path, **self._options, **_rank())
        atexit.unregister(recorder._at_exit)  # it would keep the model alive; `finish` closes
        # Not as warnings: a script may turn those off, or into errors.
        recorder._watch.tell = lambda text: self._say(f"{path}: {text}")
        for warning in caught:
            recorder._watch.tell(str(warning.message))
        recording = Recording(recorder, len(layers))
        self.recordings.append(recording)
        for m in (root, *parts_of(root, layers), module):
            self._remember(m, recording)
        if recording.rank == 0:
            n = f"{len(layers)} MoE layer" + "s" * (len(layers) > 1)
            self._say(f"recording {type(root).__name__} ({n}) into {recorder.path}")

    def _whole(self, module: nn.Module, layers: list[MoELayer]) -> nn.Module:
        """The module whose forwards are to be recorded, given one that was called."""
        for called in self._called:  # it was put into a model that has been called before
            if any(m is module for m in called.modules()):
                return called
        while True:  # out of DistributedDataParallel, torch.compile and their like
            inner = getattr(module, "module", getattr(module, "_orig_mod", None))
            if not isinstance(inner, nn.Module) or self._count(inner) < len(layers):
                break
            module = inner
        # `generate` calls the encoder before the model that it is a part of.
        around = [m for m in _pretrained_models() if any(part is module for part in m.modules())]
        largest = max(around, key=lambda m: sum(1 for _ in m.modules()), default=module)
        return largest if self._count(largest) > len(layers) else module

    def _count(self, module: nn.Module) -> int:
        try:
            return len(find_layers([module], self._adapters))
        except MoeLensError:
            return 0

    def _name(self, root: nn.Module) -> str:
        name = type(root).__name__
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}-{self._names[name]}"

    def _remember(self, module: nn.Module, state: Recording | None) -> None:
        def forget(gone: KeyedRef[int, nn.Module]) -> None:
            self._states.pop(gone.key, None)
            self._alive.pop(gone.key, None)

        self._alive[id(module)] = KeyedRef(module, forget, id(module))
        self._states[id(module)] = state

    def _refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)
            self._say(f"not recorded: {reason}")

    def _close(self, recording: Recording, error: BaseException | None) -> None:
        for text in recording.close(error):
            self._say(f"{recording.path}: {text}")


def _pretrained_models() -> list[nn.Module]:
    """Every model of transformers there is, found without importing it."""
    modules = [x for x in gc.get_objects() if issubclass(type(x), nn.Module)]
    return [m for m in modules if any(c.__name__ == "PreTrainedModel" for c in type(m).__mro__)]


def _rank() -> dict[str, int]:
    """What a launcher says of this process, where the script has not set up torch.distributed."""
    _, world = rank_and_world()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 or launched == 1:
        return {}
    return {"rank": int(os.environ["RANK"]), "world": launched}


def _keep_out_of_graphs(call: Callable[..., Any], before: Callable[..., Any]) -> None:
    """Let torch.compile begin below `call`, as below `nn.Module.__call__`, and never in `before`.

    The functions of `torch._dynamo` that do this would load the compiler, which takes a second.
    """
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        set_code_exec_strategy,
    )

    skip, default = _FrameAction.SKIP, _FrameAction.DEFAULT
    set_code_exec_strategy(call.__code__, _FrameExecStrategy(skip, default))
    set_code_exec_strategy(before.__code__, _FrameExecStrategy(skip, skip))  # and what it calls
