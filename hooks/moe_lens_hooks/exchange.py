"""All-to-alls of expert parallelism: how long a block's dispatch and its combine take on this rank.

While a recorder listens and a process group exists, `torch.distributed.all_to_all_single` and
`all_to_all` are wrapped, which megatron-core and DeepSpeed call by these names, and so is
`Work.wait`, which ends a call with `async_op=True`. What is called inside a block before its
experts run is dispatch, what is called after them is combine.

On a CUDA device a time is between two events on the current stream, which the trace writer's thread
reads once they are over: from when this rank's data was ready until it had everyone's, so with the
time it waits for the slowest rank. On a CPU it is the clock around the call (which there returns
with the data): the same.

A time is None, never a guess, where nothing was seen or not all: a call that nobody waited for
before the block returned, and experts that run in between several exchanges.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

_NAMES = ("all_to_all_single", "all_to_all")


class Span(Protocol):
    """One call."""

    def stop(self) -> None:
        """It is over, or will be in the order of the stream."""
        ...

    def ns(self) -> int:
        """What it took, once stopped. Waits for the device."""
        ...


class HostSpan:
    """By the host's clock."""

    def __init__(self) -> None:
        self._start = self._end = time.perf_counter_ns()

    def stop(self) -> None:
        self._end = time.perf_counter_ns()

    def ns(self) -> int:
        return self._end - self._start


class CudaSpan:
    """Between two events on a device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._end = self._mark()

    def stop(self) -> None:
        self._end = self._mark()

    def ns(self) -> int:
        self._end.synchronize()
        return int(1e6 * self._start.elapsed_time(self._end))

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Exchange:
    """The all-to-alls of one block in one forward, as they are called."""

    def __init__(self) -> None:
        self._dispatch: list[tuple[Span, list[bool]]] = []
        self._combine: list[tuple[Span, list[bool]]] = []
        self._ran = self._unclear = False
        self.calling = False
        """Inside a call that is timed: what it calls itself is no further one."""

    def experts(self) -> None:
        """The experts, or one of them, are about to run."""
        self._unclear |= bool(self._combine)
        self._ran = True

    def begin(self, span: Span) -> Callable[[], None]:
        """A call has begun; returns what is to be called when it is over."""
        over: list[bool] = []
        (self._combine if self._ran else self._dispatch).append((span, over))

        def end() -> None:
            if not over:
                span.stop()
                over.append(True)

        return end

    def times(self) -> Times | None:
        """The block has returned: what was seen, None if that is nothing."""
        if not (self._dispatch or self._combine) or not self._ran or self._unclear:
            return None
        return Times(_whole(self._dispatch), _whole(self._combine))


def _whole(calls: list[tuple[Span, list[bool]]]) -> list[Span] | None:
    """The calls of one direction; None where there is none, or one is not over."""
    return [span for span, _ in calls] if calls and all(over for _, over in calls) else None


class Times:
    """What a block's all-to-alls took, to be read when the forward is."""

    def __init__(self, dispatch: list[Span] | None, combine: list[Span] | None) -> None:
        self._dispatch, self._combine = dispatch, combine

    def read(self) -> tuple[int | None, int | None]:
        """Sums over the calls of dispatch and of combine, ns. Waits for the device."""
        return _sum(self._dispatch), _sum(self._combine)


def _sum(spans: list[Span] | None) -> int | None:
    return None if spans is None else sum(span.ns() for span in spans)


def experts_of(block: nn.Module) -> Iterable[nn.Module]:
    """The modules that run between a block's dispatch and its combine, as far as it names them."""
    experts = getattr(block, "experts", None)
    if isinstance(experts, nn.ModuleList):
        return tuple(experts)
    return (experts,) if isinstance(experts, nn.Module) else ()


def exchanges() -> bool:
    """Whether this process is one of a group, which alone can exchange anything."""
    return dist.is_available() and dist.is_initialized()


Listener = Callable[[], Exchange | None]
"""A bound method: the exchange of the block that this thread runs, None where there is none."""

_listeners: list[WeakMethod[Listener]] = []
_wrapped: dict[tuple[Any, str], tuple[Any, Any]] = {}
"""Of what has an attribute, and its name: what it was, and what it is."""
_pending: WeakKeyDictionary[Any, Callable[[], None]] = WeakKeyDictionary()
"""Works that somebody will wait for."""


def listen(listener: Listener) -> None:
    """Ask `listener` at every all-to-all, until `silence` or until its owner is gone."""
    _listeners.append(WeakMethod(listener, lambda _: _clear()))
    if not _wrapped:
        for name in _NAMES:
            _wrap(dist, name, _timed)
        _wrap(dist.Work, "wait", _waited)


def silence(listener: Listener) -> None:
    """Stop asking it; the last one puts all back as it was."""
    gone = WeakMethod(listener)
    _listeners[:] = [x for x in _listeners if x != gone]
    _clear()


def _clear() -> None:
    _listeners[:] = [x for x in _listeners if x() is not None]
    if _listeners:
        return
    for (owner, name), (original, ours) in _wrapped.items():
        if getattr(owner, name) is ours:  # else: wrapped by others since
            setattr(owner, name, original)
    _wrapped.clear()
    _pending.clear()


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    ours = functools.wraps(original)(wrapper(original))
    _wrapped[owner, name] = original, ours
    setattr(owner, name, ours)


def _timed(original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        asked = (f() for x in _listeners if (f := x()) is not None)
        exchange = next((x for x in asked if x is not None), None)
        tensor = None if exchange is None else _tensor((*args, *kwargs.values()))
        if exchange is None or exchange.calling or tensor is None:
            return original(*args, **kwargs)
        end = exchange.begin(CudaSpan(tensor.device) if tensor.is_cuda else HostSpan())
        exchange.calling = True
        try:
            work = original(*args, **kwargs)
        finally:
            exchange.calling = False
        if isinstance(work, dist.Work):
            _pending[work] = end
        else:
            end()
        return work

    return call


def _waited(original: Any) -> Any:
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        if _pending and (end := _pending.pop(self, None)) is not None:
            end()
        return out

    return wait


def _tensor(given: Iterable[Any]) -> Tensor | None:
    """The first tensor of the arguments: all are on one device."""
    for x in given:
        found = x if isinstance(x, Tensor) else None
        if isinstance(x, list | tuple):
            found = next((y for y in x if isinstance(y, Tensor)), None)
        if found is not None:
            return found
    return None
