"""CUDA graphs: what hooks saw while one was captured is read again after each replay.

Hooks are Python, and a replay runs none. But the tensors that they saw while the graph was captured
are where each replay writes: they are kept, and read once a replay has been queued, as if the hooks
had fired. Nothing is added to the graph but a counter on the device, one more at each replay. It
travels with the numbers: a replay that torch.cuda.CUDAGraph did not start is missed, and counted.

Legend: B sequences, S positions.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_lens_hooks.compiled import CarriedCache
from moe_lens_hooks.forward import OpenForward, Replay
from moe_lens_hooks.inputs import cache_of, said_length

_capturing: dict[int, Any] = {}
"""The graph that a thread is capturing."""

_captured: WeakKeyDictionary[Any, list[CapturedForward]] = WeakKeyDictionary()
"""Forwards of recorded models in each graph."""


@dataclass
class CapturedForward(OpenForward):
    """A forward that was captured: nothing was computed yet."""

    graph: Any = None
    again: Callable[[CapturedForward], None] | None = None
    """Called after each replay."""
    replays: int = 0
    """That Python saw."""
    missed: list[int] = field(default_factory=list)
    """Beyond those, as the landed counts told."""
    counter: Tensor | None = None

    def finish(self, again: Callable[[CapturedForward], None]) -> None:
        """The forward has returned, and its graph is still being captured."""
        if any(b.seen.changed for b in self.blocks):
            self.problem("routing was changed in place after it was used, in a captured CUDA graph")
        ids = [b.seen.expert_ids_TK for b in self.blocks]
        if ids and ids[0] is not None:
            # Uninitialised: what is captured runs at every replay, and so would the zeroing
            self.counter = torch.empty((), dtype=torch.int64, device=ids[0].device)
            self.counter.add_(1)
        self.again = again
        _captured.setdefault(self.graph, []).append(self)

    def replaying(self) -> None:
        """A replay is about to begin."""
        if self.replays == 0 and self.counter is not None:
            self.counter.zero_()

    def last_replay(self) -> Replay | None:
        """The replay that has just been queued."""
        if self.counter is None:
            return None
        return Replay(self.replays, self.counter.clone(), self.missed)

    def replayed(self) -> None:
        """A replay has been queued."""
        self.replays += 1
        if self.again is not None:
            self.again(self)


def captured_forward(inputs: dict[str, Any], implicit: bool) -> CapturedForward | None:
    """A forward that begins while this thread captures a graph; None: it captures none.

    Args:
        inputs: The root module's arguments by name: where the graph reads them at each replay.
        implicit: No root module was entered.
    """
    graph = _capturing.get(threading.get_ident()) if _capturing else None
    if graph is None:
        return None
    cache = cache_of(inputs)
    if cache is not None:
        length = said_length(cache)  # as the forward begins: it grows as its layers run
        now = length.clone() if isinstance(length, Tensor) else length or 0
        inputs = {n: CarriedCache(now) if x is cache else x for n, x in inputs.items()}
    forward = CapturedForward(-1, -1, "captured", inputs=inputs, implicit=implicit, graph=graph)
    if implicit:
        forward.problem(
            "MoE blocks were captured into a CUDA graph without their root module: capture a whole "
            "forward of the recorded model"
        )
    return forward


_users: dict[type[Any], int] = {}
_originals: dict[type[Any], dict[str, Any]] = {}


def watch_graphs(graphs: type[Any]) -> None:
    """Let a class of graphs tell when one is captured or replayed; see `unwatch_graphs`.

    Args:
        graphs: `torch.cuda.CUDAGraph`.
    """
    _users[graphs] = _users.get(graphs, 0) + 1
    if _users[graphs] > 1:
        return
    begin, end, replay = graphs.capture_begin, graphs.capture_end, graphs.replay

    @functools.wraps(begin)
    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = begin(self, *args, **kwargs)
        _capturing[threading.get_ident()] = self
        return out

    @functools.wraps(end)
    def capture_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        _capturing.pop(threading.get_ident(), None)
        return end(self, *args, **kwargs)

    @functools.wraps(replay)
    def replay_and_read(self: Any, *args: Any, **kwargs: Any) -> Any:
        forwards = _captured.get(self, ())
        for forward in forwards:
            forward.replaying()
        out = replay(self, *args, **kwargs)
        for forward in forwards:
            forward.replayed()
        return out

    _originals[graphs] = {"capture_begin": begin, "capture_end": end, "replay": replay}
    graphs.capture_begin, graphs.capture_end = capture_begin, capture_end
    graphs.replay = replay_and_read


def unwatch_graphs(graphs: type[Any]) -> None:
    """A recorder is done: the last one puts the class back as it was."""
    _users[graphs] -= 1
    if not _users[graphs]:
        for name, method in _originals.pop(graphs).items():
            setattr(graphs, name, method)
