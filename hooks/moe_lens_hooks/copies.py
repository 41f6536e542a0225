"""Copies of a hooked module, and files it is saved to, carry none of our hooks.

`copy.deepcopy` and `torch.save` take a module's hooks along. In a copy (an average of the weights,
a reference model) ours would count its forwards as the original's; in a file they cannot be stored.
So while a hook of ours is attached, what a module says of its state leaves them out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import nn

_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)

_ours: dict[int, ref[Any]] = {}
"""Handles of our hooks, by the ids with which torch numbers all hooks of a process. Weakly: a model
may be gone with its hooks, and nobody detached them."""

_original = nn.Module.__getstate__


def keep_out_of_copies(handles: Iterable[Any]) -> None:
    """These hooks are ours, until `let_go`, or until they are gone.

    Args:
        handles: What torch returned when they were attached.
    """
    for handle in handles:
        _ours[handle.id] = ref(handle, lambda _, at=handle.id: _forget([at]))  # type: ignore[misc]
    if _ours:
        nn.Module.__getstate__ = _without_hooks  # type: ignore[method-assign]


def let_go(handles: Iterable[Any]) -> None:
    """They are taken off."""
    _forget([handle.id for handle in handles])


def _forget(ids: list[int]) -> None:
    for i in ids:
        _ours.pop(i, None)
    if not _ours and nn.Module.__getstate__ is _without_hooks:  # else: patched by others since
        nn.Module.__getstate__ = _original  # type: ignore[method-assign]


def _without_hooks(module: nn.Module) -> Any:
    state: Any = _original(module)  # type: ignore[no-untyped-call]
    if not isinstance(state, dict):
        return state
    state = dict(state)  # older versions of torch give the module's own
    for name in _HOOKS:
        hooks = state.get(name, {})
        if not _ours.keys().isdisjoint(hooks):
            state[name] = OrderedDict((i, x) for i, x in hooks.items() if i not in _ours)
    return state
