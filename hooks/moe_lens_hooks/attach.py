"""Hooks on modules, each in two forms: as Python runs it, and as torch.compile traces it.

They hand what they see to a `Capture`. Every hook returns None, so nothing the model computes is
replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens_hooks.adapter import Around, MoELayer, Read
from moe_lens_hooks.capture import Capture
from moe_lens_hooks.compiled import BlockPoint, RootPoint
from moe_lens_hooks.exchange import experts_of
from moe_lens_hooks.last import make_last


def attach(capture: Capture, models: Sequence[nn.Module], layers: Sequence[MoELayer]) -> None:
    """Hook the root modules and the MoE layers; `capture.detach` undoes it."""
    try:
        for layer in layers:
            _attach_block(capture, layer)
        for i, model in enumerate(models):  # last, around the blocks': the root may be a block
            capture.keep(_attach_root(capture, i, model))
    except BaseException:
        capture.detach()
        raise


def argument_names(model: nn.Module) -> list[str]:
    """Names of the positional arguments of the model inside its wrappers."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    while isinstance(
        inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module
    ):
        model = inner  # DistributedDataParallel, torch.compile
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _attach_root(capture: Capture, chunk: int, model: nn.Module) -> list[Any]:
    names = argument_names(model)
    point = RootPoint(names, partial(capture.enter_root, chunk), partial(capture.leave_root, chunk))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            capture.replica()
            return
        if module is not model:
            return
        capture.enter_root(chunk, dict(zip(names, args, strict=False)) | kwargs)

    def traced_enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        point.trace_enter(args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        capture.leave_root(chunk, output)

    def traced_leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        point.trace_leave()

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        capture.root_ended()

    def nothing(*_: Any) -> None:
        """Compiled code that raised has no hooks to tell it."""

    # `enter` sees the replicas of DataParallel, to refuse them.
    before, after = _hook(None, enter, traced_enter), _hook(model, leave, traced_leave)
    return [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after, with_kwargs=True),
        model.register_forward_hook(_hook(model, ended, nothing), always_call=True),
    ]


def _attach_block(capture: Capture, layer: MoELayer) -> None:
    nothing: tuple[Any, ...] = ((), {}, None)
    point = BlockPoint(
        alone=all(tap.alone for tap in layer.taps),
        skips=capture.skips,
        running=partial(capture.seen_of, layer),
        enter=partial(capture.enter_block, layer),
        look=lambda read: capture.look(layer, "", read, *nothing),
        ahead=lambda read: capture.look_ahead(layer, "", read, *nothing),
        wrong=capture.wrong,
        leave=partial(capture.leave_block, layer),
    )
    inner: list[Any] = []

    def keep(handle: Any) -> None:
        capture.keep([handle], layer)  # at once: if the next one fails, this one is taken off

    def settle() -> int:
        for handle in inner:
            make_last(handle)
        return len(inner)

    # As torch.compiler.assume_constant_result does, which would import the whole compiler now:
    # while a block is traced this runs, before the hooks of the modules inside it are looked up.
    settle._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        point.seen = None
        if capture.skips():
            return
        settle()
        capture.enter_block(layer, _rows_and_positions(args, kwargs))

    def traced_enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        settle()
        point.trace_enter(_rows_and_positions(args, kwargs))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        point.seen = None
        capture.leave_block(layer)

    def traced_leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        point.trace_leave()

    # First in, first out: a tap may be the block itself.
    hook = _watched if any(tap.around is not None for tap in layer.taps) else _hook
    block = layer.block
    before, after = hook(block, enter, traced_enter), hook(block, leave, traced_leave)
    keep(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    for tap in layer.taps:
        if tap.around is not None:
            for handle in _surround(capture, tap.module, tap.around):
                keep(handle)
        elif tap.read is not None and not _holds(block, tap.module):
            assert tap.when == "input", "what is around a block is tapped for its input"
            keep(_tap_ahead(capture, layer, tap.module, tap.read, point))
        elif tap.read is not None:
            handle = _tap(capture, layer, tap.module, tap.when, tap.read, point, hook)
            keep(handle)
            if tap.module is not block:
                inner.append(handle)
    keep(block.register_forward_hook(after, with_kwargs=True))
    for experts in experts_of(block) if capture.exchanges else ():

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            capture.experts_run(layer)

        keep(experts.register_forward_pre_hook(_hook(experts, begin, _nothing)))


def _nothing(*_: Any) -> None:
    """Compiled code exchanges out of sight."""


def _tap(
    capture: Capture,
    layer: MoELayer,
    module: nn.Module,
    when: str,
    read: Read,
    point: BlockPoint,
    wrap: Callable[..., Callable[..., None]],
) -> Any:
    name = type(module).__name__

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        point.seen = None
        capture.look(layer, name, read, args, kwargs, output)

    def traced(_: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        point.trace_tap(read, name, args, kwargs, output)

    hook = wrap(module, look, traced)
    if when == "input":
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, with_kwargs=True)


def _tap_ahead(
    capture: Capture, layer: MoELayer, module: nn.Module, read: Read, point: BlockPoint
) -> Any:
    """A tap on what is around a block: what it sees is there when the block is entered."""
    name = type(module).__name__

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        point.before = None
        capture.look_ahead(layer, name, read, args, kwargs, None)

    def traced(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        point.trace_ahead(read, name, args, kwargs)

    return module.register_forward_pre_hook(_hook(module, look, traced), with_kwargs=True)


def _surround(capture: Capture, module: nn.Module, around: Around) -> list[Any]:
    """Hooks that enter a context before the module runs and leave it whatever happens."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen = capture.seen_now()
        capture.enter_context(nullcontext() if seen is None else around(seen))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        capture.leave_context()
        if (seen := capture.seen_now()) is not None:
            seen.hold()

    return [
        module.register_forward_pre_hook(_watched(module, before)),
        module.register_forward_hook(_watched(module, after), always_call=True),
    ]


def _holds(block: nn.Module, module: nn.Module) -> bool:
    return any(m is module for m in block.modules())


def _hook(
    of: nn.Module | None, plain: Callable[..., None], traced: Callable[..., None]
) -> Callable[..., None]:
    """A hook that is `traced` where torch.compile traces the module, and `plain` elsewhere.

    Args:
        of: The module it is for: in a copy that took it along it does nothing. None: any.
        plain: Called when the module runs; not while torch.jit traces, whose shapes are no numbers.
        traced: Called while torch.compile traces it.
    """

    def hook(module: nn.Module, *given: Any) -> None:
        if torch.compiler.is_compiling():
            traced(module, *given)
        elif (of is None or module is of) and not torch._C._is_tracing():
            plain(module, *given)

    return hook


def _watched(
    of: nn.Module, plain: Callable[..., None], traced: Callable[..., None] | None = None
) -> Callable[..., None]:
    """A hook of a block in which functions are watched: it does not run compiled, nor do these."""

    def hook(module: nn.Module, *given: Any) -> None:
        if module is of:
            plain(module, *given)

    return _untraced(hook)


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that breaks the graph of torch.compile and is called as it is."""
    reason = "moe_lens watches what runs inside this module, which compiled code does not show"
    return torch.compiler.disable(hook, reason=reason)  # type: ignore[no-any-return,no-untyped-call]


def _rows_and_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(first, second) size of a block's `[B, S, D]` input; None for `[T, D]`."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    first = next(tensors, None)
    return (first.shape[0], first.shape[1]) if first is not None and first.ndim == 3 else None
