"""A block put back as it was: buffers, attributes, what they hold, and the random generators."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 4
"""Containers inside containers that are looked into."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_STATE = frozenset((*_HOOKS, "_modules", "_parameters", "_buffers", "forward"))


class Snapshot:
    """What a module and its children hold, and the random state of the process.

    Tensors and containers (lists, dicts, sets) are put back in place, since others may hold them
    too. What objects of other classes hold is not seen.

    Args:
        module: The block.
        leave_out: Modules whose parameters are not copied: the experts, which are most of it.
    """

    def __init__(self, module: nn.Module, leave_out: list[nn.Module]) -> None:
        big = {id(p) for m in leave_out for p in m.parameters()}
        self._modules = list(module.modules())
        self._attributes = [
            {k: v for k, v in m.__dict__.items() if k not in _NOT_STATE} for m in self._modules
        ]
        self._buffers = [dict(m._buffers) for m in self._modules]
        self._held: dict[int, tuple[Any, Any]] = {}
        for attributes, buffers in zip(self._attributes, self._buffers, strict=True):
            for value in (*attributes.values(), *buffers.values()):
                self._hold(value, _DEPTH)
        for p in module.parameters():
            if id(p) not in big:
                self._hold(p, 1)
        devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
        self._cuda = {i: torch.cuda.get_rng_state(i) for i in devices}
        self._random = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002

    def restore(self) -> None:
        """Put everything back."""
        for value, saved in self._held.values():
            _put_back(value, saved)
        zipped = zip(self._modules, self._attributes, self._buffers, strict=True)
        for m, attributes, buffers in zipped:
            for name in [k for k in m.__dict__ if k not in attributes and k not in _NOT_STATE]:
                del m.__dict__[name]
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)
        torch.set_rng_state(self._random[0])
        random.setstate(self._random[1])
        np.random.set_state(self._random[2])  # noqa: NPY002
        for i, state in self._cuda.items():
            torch.cuda.set_rng_state(state, i)

    def _hold(self, value: Any, depth: int) -> None:
        if id(value) in self._held or depth == 0:
            return
        if isinstance(value, Tensor):
            self._held[id(value)] = (value, value.detach().clone())
        elif isinstance(value, torch.Generator):
            self._held[id(value)] = (value, value.get_state())
        elif isinstance(value, list | dict | set | deque):
            self._held[id(value)] = (value, value.copy())
            for inner in value.values() if isinstance(value, dict) else value:
                self._hold(inner, depth - 1)


def _put_back(value: Any, saved: Any) -> None:
    if isinstance(value, Tensor):
        if value.shape != saved.shape:
            value.data = saved.clone()
        elif not torch.equal(_bits(value), _bits(saved)):
            value.data.copy_(saved)  # not a new version: a graph may hold it
    elif isinstance(value, torch.Generator):
        value.set_state(saved)
    elif isinstance(value, list):
        value[:] = saved
    else:
        value.clear()
        value.extend(saved) if isinstance(value, deque) else value.update(saved)


def _bits(x: Tensor) -> Tensor:
    """As bytes, for which NaN is equal to itself."""
    return x.detach().contiguous().view(torch.uint8) if x.ndim else x.detach().reshape(1)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Run a module with no hook of its children firing, the user's included."""
    saved = [(m, name, m.__dict__[name]) for m in module.modules() for name in _HOOKS]
    try:
        for m, name, hooks in saved:
            m.__dict__[name] = type(hooks)()
        yield
    finally:
        for m, name, hooks in saved:
            m.__dict__[name] = hooks


def copied(x: Any) -> Any:
    """Arguments of a call, their tensors copied: a block may change its input in place."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if type(x) in (tuple, list):
        return type(x)(copied(v) for v in x)
    if type(x) is dict:
        return {k: copied(v) for k, v in x.items()}
    return x
