"""The forward that is running: what hooks see of its MoE blocks is put together here.

Nothing raises into a forward for what is seen: problems travel with the counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from moe_lens.errors import CaptureBreach, NoMoELayers, UnsupportedRouter
from moe_lens_hooks.adapter import MoELayer, Observed, Read
from moe_lens_hooks.copies import keep_out_of_copies, let_go
from moe_lens_hooks.exchange import Exchange, exchanges, listen, silence
from moe_lens_hooks.finding import DATA_PARALLEL
from moe_lens_hooks.forward import Block, OpenForward, recomputing
from moe_lens_hooks.graphs import (
    CapturedForward,
    captured_forward,
    unwatch_graphs,
    watch_graphs,
)
from moe_lens_hooks.pausing import SkippedForward
from moe_lens_hooks.semantics import selection_bias

_recorded: WeakSet[nn.Module] = WeakSet()
"""Blocks that a recorder is attached to: two on one block would each see half of the truth."""

Begin = Callable[[dict[str, Any], bool], OpenForward]
"""(the root's arguments by name, implicit) to the new forward."""

HELD_BYTES = 32 << 20
"""Bytes of routing tensors that a forward may hold before they are reduced: many small layers are
reduced at once, large ones as they come."""


@dataclass(slots=True)
class _Running:
    """A block that was entered and has not returned."""

    layer: MoELayer
    seen: Observed
    shape: tuple[int, int] | None
    """First two sizes of its input `[B, S, D]`; None for `[T, D]`."""
    exchange: Exchange | None


class Capture:
    """Keeps track of the forward that is running; `attach` hooks a model up to it.

    Args:
        models: The root module, or the chunks of one that this rank runs in a pipeline, in the
            order in which a token passes them; empty: there is only `implicit`.
        layers: Its MoE layers.
        begin: Makes the state of a new forward: a `SkippedForward`, where it is not recorded.
        met: Takes a forward that runs and a block of it that has just returned.
        full: Takes a forward that runs and holds more than `HELD_BYTES`, to reduce its blocks.
        end: Takes a forward that is over.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        layers: list[MoELayer],
        begin: Begin,
        met: Callable[[OpenForward, Block], None],
        full: Callable[[OpenForward], None],
        end: Callable[[OpenForward], None],
    ) -> None:
        taken = [x.info.path for x in layers if x.block in _recorded]
        if taken:
            raise CaptureBreach(
                f"another recorder is attached to this model already ({taken[0]} and "
                f"{len(taken) - 1} more). Close it first: each forward is recorded once."
            )
        self._begin, self._met, self._full, self._end = begin, met, full, end
        self._layers = layers
        self._stack: list[_Running] = []
        self._contexts: dict[int, list[AbstractContextManager[Any]]] = {}
        """Entered by hooks and not left, by thread: torch's modes belong to one."""
        self._seen_ahead: dict[nn.Module, Observed] = {}
        """What taps around a block saw before it is entered."""
        self.current: OpenForward | None = None
        self._chunks = len(models)
        self._runs = [0] * len(models)
        self._between: dict[int, OpenForward] = {}
        """Pipeline: forwards that are between two chunks, by their number in the step."""
        self.entered: set[nn.Module] = set()
        """Blocks that ran at least once."""
        self.aborted = 0
        """Forwards that an exception ended before their root module returned."""
        self._handles: list[Any] = []
        self._handles_of: dict[int, list[Any]] = {}
        """By layer (its id)."""
        self._refusing: dict[int, UnsupportedRouter] = {}
        """Layers (by id) whose routing turned out to be out of sight, until their block returns."""
        self.refused: list[str] = []
        """Why layers are not recorded any more."""
        self.left_out: list[str] = []
        """What looked like a layer and is none."""
        self._told: list[str] = []
        _recorded.update(x.block for x in layers)
        watch_graphs(torch.cuda.CUDAGraph)
        self.exchanges = exchanges()
        """All-to-alls inside blocks are timed."""
        if self.exchanges:
            listen(self._exchanging)
        self._lock = threading.Lock()
        """Held where threads share a `SkippedForward`."""
        self._attached = True

    def enter_context(self, context: AbstractContextManager[Any]) -> None:
        """A module is about to run inside this context."""
        context.__enter__()
        self._contexts.setdefault(threading.get_ident(), []).append(context)

    def leave_context(self) -> None:
        """It has run."""
        if mine := self._contexts.get(threading.get_ident()):
            mine.pop().__exit__(None, None, None)

    def _leave_contexts(self) -> None:
        """No module runs: what is still entered was left behind by Ctrl-C, which skips hooks."""
        for context in reversed(self._contexts.pop(threading.get_ident(), [])):
            context.__exit__(None, None, None)

    def keep(self, handles: Iterable[Any], layer: MoELayer | None = None) -> None:
        """Remember hooks, of a layer or of the root, to take them off again."""
        handles = list(handles)
        keep_out_of_copies(handles)
        self._handles += handles
        if layer is not None:
            self._handles_of.setdefault(id(layer), []).extend(handles)

    def detach(self) -> None:
        """Take every hook off again."""
        self._leave_contexts()
        if isinstance(self.current, SkippedForward):
            self.current = None  # without a lock, which a fork may have left locked
        self._abort()
        if not self._attached:
            return
        self._attached = False
        unwatch_graphs(torch.cuda.CUDAGraph)
        silence(self._exchanging)
        for handle in self._handles:
            handle.remove()
        let_go(self._handles)
        self._handles.clear()
        for layer in self._layers:
            _recorded.discard(layer.block)

    def implicit(self) -> OpenForward:
        """The running forward, or a new one that no root module opened."""
        if self.current is None:
            self.current = captured_forward({}, True) or self._begin({}, True)
        return self.current

    def abandon(self) -> None:
        """A step ends: a forward that is still open was ended by an exception."""
        self._leave_contexts()
        self._abort()
        for forward in self._between.values():  # micro-batches that did not pass all chunks
            forward.problem("a micro-batch did not run through all pipeline chunks in one step")
            self._over(forward)
        self._between.clear()
        self._runs = [0] * self._chunks

    def _abort(self) -> None:
        """The running forward, if there is one, will not return."""
        if isinstance(self.current, SkippedForward):
            self._leave_skipped()
        elif self.current is not None:
            self.aborted, self.current = self.aborted + 1, None
        self._stack.clear()

    def skips(self) -> bool:
        """A root module's forward is running, and is not recorded."""
        forward = self.current
        return isinstance(forward, SkippedForward) and not forward.implicit

    def _join_skipped(self) -> bool:
        """Beside a forward of another thread that is not recorded, this thread's is not either."""
        with self._lock:
            forward = self.current
            if not isinstance(forward, SkippedForward) or forward.implicit:
                return False
            if forward.leave():  # compiled code raised, which has no hooks to tell it
                self.current = None
                return False
            forward.join()
            return True

    def _leave_skipped(self) -> SkippedForward | None:
        """This thread's forward, not recorded, is over; None: others' beside it are not."""
        with self._lock:
            forward = self.current
            if not isinstance(forward, SkippedForward) or not forward.leave():
                return None
            self.current = None
            return forward

    def end_implicit(self) -> None:
        """A step or a root forward begins or ends: what ran without a root belongs together."""
        if self.current is not None and self.current.implicit:
            forward, self.current = self.current, None
            self._over(forward)

    def look(
        self,
        layer: MoELayer,
        name: str,
        read: Read,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """A module of the block that is running was tapped."""
        seen = self.seen_of(layer)
        if seen is None or recomputing() or self._elsewhere():
            return
        earlier = seen.expert_ids_TK
        self._read(layer, seen, name, read, args, kwargs, output)
        if earlier is not None and seen.expert_ids_TK is not earlier:
            seen.calls += 1

    def look_ahead(
        self,
        layer: MoELayer,
        name: str,
        read: Read,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """A module around a block that is still to run was tapped."""
        if recomputing() or self._elsewhere() or isinstance(self.implicit(), SkippedForward):
            return
        seen = self._seen_ahead[layer.block] = Observed()
        self._read(layer, seen, name, read, args, kwargs, output)

    def _read(
        self,
        layer: MoELayer,
        seen: Observed,
        name: str,
        read: Read,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        """Let the adapter look; its mistakes are breaches, not exceptions inside the model."""
        try:
            read(seen, args, kwargs, output)
        except UnsupportedRouter as e:
            self._refusing[id(layer)] = e
        except Exception as e:
            self.wrong(f"{name} ({type(e).__name__}: {e})")
        else:
            seen.hold()

    def _refuse(self, forward: OpenForward, layer: MoELayer, error: UnsupportedRouter) -> None:
        """A layer's routing cannot be seen: nothing of it is recorded from here on."""
        for handle in self._handles_of[id(layer)]:
            handle.remove()
        _recorded.discard(layer.block)
        forward.expected -= 1
        if isinstance(error, NoMoELayers):
            self.left_out.append(str(error))
        else:
            self.refused.append(str(error))
            forward.problem(str(error))

    @property
    def blind(self) -> str | None:
        """Why no layer of the model is recorded any more; None while there is one."""
        gone = [*self.refused, *self._told, *self.left_out]
        if not self._layers or len(gone) < len(self._layers):
            return None
        return f"the model has no MoE layer that can be recorded: {'; '.join(gone)}"

    def take_left_out(self) -> list[str]:
        """What looked like a layer and is none, each told once."""
        told, self.left_out = self.left_out, []
        self._told += told
        return told

    def wrong(self, what: str) -> None:
        """An adapter stumbled over a module."""
        if self.current is not None and not recomputing():
            self.current.problem(f"the adapter could not read {what}")

    def seen_of(self, layer: MoELayer) -> Observed | None:
        """What is seen so far of a block, if it is the one that is running."""
        stack = self._stack
        return stack[-1].seen if stack and stack[-1].layer is layer else None

    def seen_now(self) -> Observed | None:
        """What is seen so far of the block that is running; None if that is not to be recorded."""
        if not self._stack or recomputing() or self._elsewhere():
            return None
        return self._stack[-1].seen

    def _exchanging(self) -> Exchange | None:
        """Where an all-to-all that this thread calls now belongs; None: to no block's forward."""
        forward = self.current
        if not self._stack or forward is None or forward.thread != threading.get_ident():
            return None
        if recomputing() or isinstance(forward, CapturedForward):  # a graph has no clock
            return None
        return self._stack[-1].exchange

    def experts_run(self, layer: MoELayer) -> None:
        """Experts of a block are about to run: what it exchanges from here on is combine."""
        exchange = self._exchanging()
        if exchange is not None and self._stack[-1].layer is layer:
            exchange.experts()

    def _elsewhere(self) -> bool:
        """Another thread is in the middle of a forward: what this one sees is not of it."""
        forward = self.current
        if forward is None or forward.thread == threading.get_ident():
            return False
        if isinstance(forward, SkippedForward) and forward.implicit:
            return False
        forward.problem(
            "two threads ran the model at once: only the first one's forward is recorded"
        )
        return True

    def enter_root(self, chunk: int, inputs: dict[str, Any]) -> None:
        """The root module, or a chunk of it, is entered with these arguments."""
        if recomputing() or self._join_skipped() or self._elsewhere():
            return
        self.end_implicit()
        self._abort()
        self._leave_contexts()
        number, self._runs[chunk] = self._runs[chunk], self._runs[chunk] + 1
        self.current = self._between.pop(number, None) if chunk else None
        if self.current is None:
            self.current = captured_forward(inputs, False) or self._begin(inputs, False)

    def replica(self) -> None:
        """A copy of the model that DataParallel made is about to run in a thread of its own."""
        self.implicit().problem(DATA_PARALLEL)

    def leave_root(self, chunk: int, output: Any = None) -> None:
        """It has returned."""
        forward: OpenForward | None = self.current
        if recomputing() or forward is None:
            return
        if isinstance(forward, SkippedForward):
            forward = self._leave_skipped()
            if forward is None:
                return
        elif self._elsewhere():
            return
        else:
            self.current, forward.returned = None, output
        if chunk < self._chunks - 1:
            self._between[self._runs[chunk] - 1] = forward
        else:
            self._over(forward)

    def root_ended(self) -> None:
        """The root module has returned or raised; if it raised, its forward is over too."""
        if recomputing() or self.current is None or self.current.implicit:
            return
        if isinstance(self.current, SkippedForward) or not self._elsewhere():
            self._abort()  # and with it the model's tensors go
            self._leave_contexts()

    def _over(self, forward: OpenForward) -> None:
        if not isinstance(forward, CapturedForward):
            self._end(forward)
        elif forward.implicit:
            refused = self._begin({}, True)
            refused.expected, refused.problems = forward.expected, forward.problems
            self._end(refused)
        else:
            forward.finish(self._replayed)

    def _replayed(self, captured: CapturedForward) -> None:
        """A replay of a captured forward has been queued: see what its hooks would have seen."""
        if not self._attached:
            return
        self.end_implicit()
        if self.current is not None:
            self.current.problem("a CUDA graph of a recorded model was replayed inside a forward")
            return
        forward = self._begin(captured.inputs, False)
        if isinstance(forward, SkippedForward):
            self._end(forward)
            return
        forward.expected, forward.problems = captured.expected, dict(captured.problems)
        forward.replay = captured.last_replay()
        forward.blocks = list(captured.blocks)
        self.entered.update(block.key[0] for block in captured.blocks)
        self._end(forward)

    def enter_block(self, layer: MoELayer, shape: tuple[int, int] | None) -> None:
        """An MoE block is entered; `shape` is (B, S) of its input, None for `[T, D]`."""
        if recomputing() or self._elsewhere():
            return
        forward = self.current
        if forward is not None and forward.implicit and id(layer.block) in forward.entered:
            self.end_implicit()  # the same block again: the next forward without a root
        forward = self.implicit()
        if isinstance(forward, SkippedForward):
            forward.entered[id(layer.block)] = 1
            return
        forward.expected += 1
        self.entered.add(layer.block)
        ahead = self._seen_ahead
        seen = ahead.pop(layer.block) if layer.block in ahead else Observed()
        if not isinstance(forward, CapturedForward):  # whose replays find other biases
            bias = selection_bias(layer.router, layer.info.experts)
            if bias is not None:
                seen.hold_bias(bias)
        self._stack.append(_Running(layer, seen, shape, Exchange() if self.exchanges else None))

    def leave_block(self, layer: MoELayer) -> None:
        """It has returned: what was seen of it is handed on."""
        if recomputing() or self._elsewhere() or not self._stack or self.current is None:
            return
        running = self._stack.pop()
        seen, shape = running.seen, running.shape
        times = self.current.entered.get(id(layer.block), 0)
        self.current.entered[id(layer.block)] = times + 1
        if error := self._refusing.pop(id(layer), None):
            self._refuse(self.current, layer, error)
            return
        if seen.expert_ids_TK is None or seen.weights_TK is None:
            self.current.problem(
                f"{layer.info.path} ran, but its adapter ({layer.info.adapter}) saw no ids or "
                "weights: fused or compiled code may bypass the experts module; see docs/hooks.md"
            )
            return
        if seen.calls > 1:
            self.current.problem(
                f"{layer.info.path} called its experts {seen.calls} times in one forward: "
                "only whole calls can be recorded. Write an adapter that joins them (docs/hooks.md)"
            )
            return
        info = layer.info if times == 0 else replace(layer.info, path=f"{layer.info.path} #{times}")
        took = None if running.exchange is None else running.exchange.times()
        self.add(Block((layer.block, times), info, layer.router, shape, seen, took))

    def add(self, block: Block) -> None:
        """A layer of the forward that is running was seen."""
        forward = self.implicit()
        if isinstance(forward, SkippedForward):
            return
        forward.add(block)
        if isinstance(forward, CapturedForward):
            return
        with torch.inference_mode():
            self._met(forward, block)
            if forward.held_bytes > HELD_BYTES:
                self._full(forward)
