"""Forwards that a part of the model begins: its encoder alone, or the model inside a wrapper.

The hooks on the root module see the arguments of a forward (padding, positions, cache), but only
where the root itself is called. Scripts also call a part: `generate` runs the encoder first, a
LightningModule calls the model inside it. With these hooks, whichever runs first among the root and
the parts that hold all MoE layers, or all of one stream, opens the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.attach import argument_names
from moe_lens_hooks.capture import Capture
from moe_lens_hooks.forward import OpenForward, recomputing


def parts_of(root: nn.Module, layers: Sequence[MoELayer]) -> list[nn.Module]:
    """Modules below `root` that hold all its MoE layers, or all of one stream; outermost first."""
    path_of = {id(module): path for path, module in root.named_modules()}
    found: dict[str, nn.Module] = {}
    for stream in {x.info.stream for x in layers}:
        blocks = [path_of[id(x.block)] for x in layers if x.info.stream == stream]
        names = blocks[0].split(".")
        around = (".".join(names[:depth]) for depth in range(1, len(names)))
        for path in around:
            if all(block.startswith(f"{path}.") for block in blocks):
                found[path] = root.get_submodule(path)
    return [found[path] for path in sorted(found, key=lambda p: (p.count("."), p))]


def open_forwards_at(parts: Sequence[nn.Module], capture: Capture) -> None:
    """Let each part begin and end a forward where none is running; `capture.detach` undoes it."""
    for part in parts:
        _PartRoot(capture, part)


class _PartRoot:
    def __init__(self, capture: Capture, part: nn.Module) -> None:
        self._capture = capture
        self._names = argument_names(part)
        self._opened: OpenForward | None = None
        self._part = part
        capture.keep([part.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)])
        capture.keep([part.register_forward_hook(self._leave)])
        capture.keep([part.register_forward_hook(self._ended, always_call=True)])

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Inside a compiled graph there is nothing to open: what called the graph opened it.
        if torch.compiler.is_compiling() or recomputing() or module is not self._part:
            return
        running = self._capture.current
        if running is None or running.implicit:
            self._capture.enter_root(0, dict(zip(self._names, args, strict=False)) | kwargs)
            self._opened = self._capture.current

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._runs(module):
            self._opened = None
            self._capture.leave_root(0, output)

    def _ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called after `_leave`, and where the part has raised, without it."""
        if self._runs(module):
            self._opened = None
            self._capture.root_ended()

    def _runs(self, module: nn.Module) -> bool:
        """The forward that this part opened is still the one that runs."""
        if torch.compiler.is_compiling() or recomputing() or module is not self._part:
            return False
        return self._opened is not None and self._capture.current is self._opened
