"""A GPU that is not there: tensors with shapes and no values, and graphs that replay.

On fake tensors every look at a value on the host raises (`.item()`, `.tolist()`, `bool()`, boolean
indexing), and `NoWaiting` raises for copies between host and device that would be waited for. What
runs under both makes no GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.delayed import LateLanding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")
"""Stands for a GPU: torch built without CUDA cannot even index a fake tensor on a CUDA device."""


class NoWaiting(TorchDispatchMode):
    """Raises for operations on host and device together, but those of a lane.

    A number of the host (a 0-dim tensor) may enter a kernel as an argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tensors = [x for x in given if x.ndim or x.device.type != "cpu"]
        tensors += [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if {"cpu", DEVICE.type} <= {x.device.type for x in tensors}:
            raise AssertionError(f"{func} between host and device, which would be waited for")
        return out


class FakeLane:
    """A lane to a device without values: zeros arrive."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], LateLanding]:
        shapes = [(tuple(t.shape), t.dtype) for t in tensors]
        with torch.utils._python_dispatch._disable_current_modes():
            host = [torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in shapes]
        return host, LateLanding([])

    def bring(self, host: Tensor) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, device=self.device)


class FakeGraph:
    """Plays `torch.cuda.CUDAGraph` on the CPU: a replay runs what was captured, and no Python.

    Every operation writes where it wrote when it was captured.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._mode: TorchDispatchMode | None = None

    def capture_begin(self) -> None:
        calls = self._calls

        class Capture(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                out = func(*args, **(kwargs or {}))
                calls.append((func, args, kwargs or {}, out))
                return out

        self._mode = Capture()
        self._mode.__enter__()

    def capture_end(self) -> None:
        assert self._mode is not None
        self._mode.__exit__(None, None, None)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                if func.overloadpacket.__name__ == "empty":
                    continue  # memory is given while capturing
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.data.copy_(new)  # .data: a replay moves no version counter

    def clear_memory(self) -> None:
        """Nothing that was written while capturing is there: only a replay writes it."""
        given = {id(x) for _, args, kw, _ in self._calls for x in tree_leaves((args, kw))}
        made = [x for *_, out in self._calls for x in tree_leaves(out) if isinstance(x, Tensor)]
        tree_map(lambda x: x.data.fill_(-1) if id(x) not in given else x, made)
