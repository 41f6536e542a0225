"""Hooks on a model: they see each MoE block being entered, and what its experts are given.

Every hook returns None, so nothing the model computes is replaced, and none raises into a forward
for what it sees: problems travel with the counts.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from moe_lens.errors import CaptureBreach, NoMoELayers, UnsupportedRouter
from moe_lens_hooks.adapter import Adapter, Around, MoELayer, Observed, Read
from moe_lens_hooks.forward import OpenForward, recomputing

_SOFT = re.compile(r"soft_?(moe|mixture)", re.IGNORECASE)

_recorded: WeakSet[nn.Module] = WeakSet()
"""Blocks that a recorder is attached to: two on one block would each see half of the truth."""

Begin = Callable[[dict[str, Any], bool], OpenForward]
"""(the root's arguments by name, implicit) to the new forward."""
Fire = Callable[[OpenForward, MoELayer, int, tuple[int, int] | None, Observed], None]
"""(forward, layer, how often its block was entered before, its input's (B, S), what was seen)."""


def find_layers(models: Sequence[nn.Module], adapters: Sequence[Adapter]) -> list[MoELayer]:
    """The MoE layers of a model; a module that one adapter took is not offered to the next.

    Args:
        models: The model, or its pipeline chunks: then their numbers lead the paths of the layers.
        adapters: Asked in this order.

    Raises:
        NoMoELayers: None was recognised.
        UnsupportedRouter: A block is an MoE whose routing cannot be seen.
    """
    found: list[MoELayer] = []
    for path, module in _named_modules(models):
        if _SOFT.search(type(module).__name__):
            raise UnsupportedRouter(
                f"{path} ({type(module).__name__}) is a soft mixture: each expert computes a blend "
                "of all tokens, so there is no routing decision to record."
            )
        layers = (adapter.layer(path, module) for adapter in adapters)
        layer = next((x for x in layers if x is not None), None)
        if layer is not None:
            found.append(layer)
    if not found:
        names = ", ".join(a.name for a in adapters)
        raise NoMoELayers(
            f"{type(models[0]).__name__} has no MoE layer that an adapter recognises ({names}). "
            "If it is dense there is nothing to record; if it routes, write an adapter in 30 lines "
            "(docs/hooks.md), or record(None, …) and hand the routing to rec.log(layer, "
            "expert_ids, weights)."
        )
    return found


def _named_modules(models: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if len(models) == 1:
        yield from models[0].named_modules()
        return
    for i, model in enumerate(models):
        yield from model.named_modules(prefix=str(i))


class Capture:
    """Attaches hooks and keeps track of the forward that is running.

    Args:
        models: The root module, or the chunks of one that this rank runs in a pipeline, in the
            order in which a token passes them; empty: nothing is hooked.
        layers: Its MoE layers.
        begin: Makes the state of a new forward.
        fire: Takes what one block was seen to do.
        end: Takes a forward that is over.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        layers: list[MoELayer],
        begin: Begin,
        fire: Fire,
        end: Callable[[OpenForward], None],
    ) -> None:
        taken = [x.info.path for x in layers if x.block in _recorded]
        if taken:
            raise CaptureBreach(
                f"another recorder is attached to this model already ({taken[0]} and "
                f"{len(taken) - 1} more). Close it first: each forward is recorded once."
            )
        self._begin, self._fire, self._end = begin, fire, end
        self._layers = layers
        self._stack: list[Observed] = []
        self._shapes: list[tuple[int, int] | None] = []
        self._contexts: list[AbstractContextManager[Any]] = []
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
        for layer in layers:
            self._attach(layer)
            _recorded.add(layer.block)
        for i, model in enumerate(models):  # last, around the blocks': the root may be a block
            self._attach_root(i, model)

    def detach(self) -> None:
        """Take every hook off again."""
        if self.current is not None:
            self.aborted, self.current = self.aborted + 1, None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            _recorded.discard(layer.block)

    def implicit(self) -> OpenForward:
        """The running forward, or a new one that no root module opened."""
        if self.current is None:
            self.current = self._begin({}, True)
        return self.current

    def abandon(self) -> None:
        """A step ends: a forward that is still open was ended by an exception."""
        if self.current is not None:
            self.aborted, self.current = self.aborted + 1, None
            self._stack.clear()
            self._shapes.clear()
        for forward in self._between.values():  # micro-batches that did not pass all chunks
            forward.problem("a micro-batch did not run through all pipeline chunks in one step")
            self._end(forward)
        self._between.clear()
        self._runs = [0] * self._chunks

    def end_implicit(self) -> None:
        """A step or a root forward begins or ends: what ran without a root belongs together."""
        if self.current is not None and self.current.implicit:
            forward, self.current = self.current, None
            self._end(forward)

    def _attach_root(self, chunk: int, model: nn.Module) -> None:
        names = _argument_names(model)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter_root(chunk, dict(zip(names, args, strict=False)) | kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._leave_root(chunk)

        self._handles += [
            model.register_forward_pre_hook(_untraced(enter), with_kwargs=True, prepend=True),
            model.register_forward_hook(_untraced(leave), with_kwargs=True),
        ]

    def _attach(self, layer: MoELayer) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter_block(layer, args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._leave_block(layer)

        # First in, first out: a tap may be the block itself.
        self._handles += [
            layer.block.register_forward_pre_hook(_untraced(enter), with_kwargs=True, prepend=True),
        ]
        for tap in layer.taps:
            if tap.around is not None:
                self._surround(tap.module, tap.around)
            elif tap.read is not None:
                self._tap(tap.module, tap.when, tap.read)
        self._handles.append(layer.block.register_forward_hook(_untraced(leave), with_kwargs=True))

    def _tap(self, module: nn.Module, when: str, read: Read) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stack and not recomputing() and not self._elsewhere():
                seen = self._stack[-1]
                earlier = seen.expert_ids_TK
                self._read(read, module, args, kwargs, None)
                if earlier is not None and seen.expert_ids_TK is not earlier:
                    seen.calls += 1

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            if self._stack and not recomputing() and not self._elsewhere():
                self._read(read, module, args, kwargs, output)

        if when == "input":
            handle = module.register_forward_pre_hook(_untraced(before), with_kwargs=True)
        else:
            handle = module.register_forward_hook(_untraced(after), with_kwargs=True)
        self._handles.append(handle)

    def _surround(self, module: nn.Module, around: Around) -> None:
        """Hooks that enter a context before the module runs and leave it whatever happens."""

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            context: AbstractContextManager[Any] = nullcontext()
            if self._stack and not recomputing() and not self._elsewhere():
                context = around(self._stack[-1])
            context.__enter__()
            self._contexts.append(context)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._contexts:
                self._contexts.pop().__exit__(None, None, None)
            if self._stack and not recomputing() and not self._elsewhere():
                self._stack[-1].hold()

        self._handles += [
            module.register_forward_pre_hook(_untraced(before)),
            module.register_forward_hook(_untraced(after), always_call=True),
        ]

    def _read(self, read: Read, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Let the adapter look; its mistakes are breaches, not exceptions inside the model."""
        try:
            read(self._stack[-1], args, kwargs, output)
        except Exception as e:
            assert self.current is not None
            what = f"{type(e).__name__}: {e}"
            self.current.problem(f"the adapter could not read {type(module).__name__} ({what})")
        else:
            self._stack[-1].hold()

    def _elsewhere(self) -> bool:
        """Another thread is in the middle of a forward: what this one sees is not of it."""
        forward = self.current
        if forward is None or forward.thread == threading.get_ident():
            return False
        forward.problem(
            "two threads ran the model at once: only the first one's forward is recorded"
        )
        return True

    def _enter_root(self, chunk: int, inputs: dict[str, Any]) -> None:
        if recomputing() or self._elsewhere():
            return
        self.end_implicit()
        if self.current is not None:
            self.aborted += 1
        self._stack.clear()
        self._shapes.clear()
        number, self._runs[chunk] = self._runs[chunk], self._runs[chunk] + 1
        self.current = self._between.pop(number, None) if chunk else None
        if self.current is None:
            self.current = self._begin(inputs, False)

    def _leave_root(self, chunk: int) -> None:
        if recomputing() or self.current is None or self._elsewhere():
            return
        forward, self.current = self.current, None
        if chunk < self._chunks - 1:
            self._between[self._runs[chunk] - 1] = forward
        else:
            self._end(forward)

    def _enter_block(self, layer: MoELayer, args: tuple[Any, ...], kwargs: Any) -> None:
        if recomputing() or self._elsewhere():
            return
        forward = self.current
        if forward is not None and forward.implicit and id(layer.block) in forward.entered:
            self.end_implicit()  # the same block again: the next forward without a root
        forward = self.implicit()
        forward.expected += 1
        self.entered.add(layer.block)
        self._stack.append(Observed())
        self._shapes.append(_rows_and_positions(args, kwargs))

    def _leave_block(self, layer: MoELayer) -> None:
        if recomputing() or self._elsewhere() or not self._stack or self.current is None:
            return
        seen, shape = self._stack.pop(), self._shapes.pop()
        times = self.current.entered.get(id(layer.block), 0)
        self.current.entered[id(layer.block)] = times + 1
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
        with torch.inference_mode():
            self._fire(self.current, layer, times, shape, seen)


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep torch.compile from tracing the hook: it breaks the graph here and calls it as it is."""
    return torch.compiler.disable(hook)  # type: ignore[no-any-return,no-untyped-call]


def _argument_names(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    while isinstance(
        inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module
    ):
        model = inner  # DistributedDataParallel, torch.compile
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _rows_and_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(first, second) size of a block's `[B, S, D]` input; None for `[T, D]`."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    first = next(tensors, None)
    return (first.shape[0], first.shape[1]) if first is not None and first.ndim == 3 else None
