"""What the experts really consumed: a wrap of their forward that knows nothing of moe_lens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def spy(model: nn.Module) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(path, ids `[T, K]`, weights `[T, K]`) of every call of an `experts` module, in order.

    Replaces `forward` on the instance, beneath every hook: what it copies is what computes.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    wrapped: list[nn.Module] = []
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            module.forward = _wrapped(path, module.forward, names, calls)
            wrapped.append(module)
    try:
        yield calls
    finally:
        for module in wrapped:
            del module.forward


def _wrapped(
    path: str, forward: Any, names: list[str], calls: list[tuple[str, Tensor, Tensor]]
) -> Any:
    def inner(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, weights = (given[names[1]], given[names[2]])
        calls.append((path, ids.detach().clone(), weights.detach().clone()))
        return forward(*args, **kwargs)

    return inner


def ablated(model: nn.Module, experts: nn.Module, expert: int, run: Any) -> Tensor:
    """Output of `experts` (all calls concatenated) with one expert's output weights set to zero."""
    parameters = dict(experts.named_parameters())
    names = [n for n in ("down_proj", "down_proj_bias") if n in parameters]
    saved = {n: parameters[n].detach().clone() for n in names}
    outputs: list[Tensor] = []
    handle = experts.register_forward_hook(lambda m, a, out: outputs.append(out.detach().clone()))
    try:
        with torch.no_grad():
            for n in names:
                parameters[n][expert] = 0
        run()
    finally:
        handle.remove()
        with torch.no_grad():
            for n in names:
                parameters[n].copy_(saved[n])
    return torch.cat([o.reshape(-1, o.shape[-1]) for o in outputs])
