"""A stream that is late: copies to the host are made when somebody waits for them, not before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

POISON = 0x7B
"""What every byte of a buffer holds until its copy has landed."""


class LateLanding:
    """Runs the copies when it is waited for."""

    def __init__(self, copies: list[Callable[[], object]]) -> None:
        self._copies = copies

    def synchronize(self) -> None:
        while self._copies:
            self._copies.pop()()


class LateLane:
    """A `Lane` for tensors of the host.

    Attributes:
        sent: Tensors for which a copy was started.
    """

    def __init__(self) -> None:
        self.sent = 0

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], LateLanding]:
        self.sent += len(tensors)
        host = [poisoned(t) for t in tensors]
        pairs = zip(host, tensors, strict=True)
        return host, LateLanding([_copy(to, weakref.ref(source)) for to, source in pairs])

    def bring(self, host: Tensor) -> Tensor:
        return host.clone()


def _copy(to: Tensor, source: weakref.ref[Tensor]) -> Callable[[], None]:
    """Copies, if the source was not freed before its turn came."""

    def copy() -> None:
        tensor = source()
        assert tensor is not None, "freed before its copy has run"
        to.copy_(tensor)

    return copy


def poisoned(like: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, every byte of it poison."""
    raw = torch.full((max(1, like.numel()) * like.element_size(),), POISON, dtype=torch.uint8)
    if like.dtype == torch.bool:  # a bool of another byte than 0 and 1 is not a value
        return torch.ones(like.shape, dtype=torch.bool)
    return raw.view(like.dtype)[: like.numel()].view(like.shape)
