"""What torch functions a module calls while it runs, and which library a module's class is from.

For routers that keep in local variables what their output no longer tells: whom a dropped choice
wanted, or whether a second choice was made at all. It is seen, not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

See = Callable[[str, tuple[Any, ...], Any], None]
"""(name of the function, its positional arguments, what it returned)."""


class TorchCalls(TorchFunctionMode):
    """A context in which `see` is told of every torch function that this thread calls.

    Args:
        see: Called after each; what is modified in place later must be cloned there.
    """

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see(getattr(func, "__name__", ""), args, result)
        return result


def derives(module: object, package: str, *names: str) -> bool:
    """Whether a module's class, or one that it inherits from, is of this package and name.

    The package itself is not imported.
    """
    return any(
        c.__name__ in names and c.__module__.partition(".")[0] == package
        for c in type(module).__mro__
    )


def rows_of_each(expert_ids_TK: Tensor, experts: int) -> Tensor:
    """How often each expert is chosen, `[E]`; ids out of range are the checks' to find.

    `bincount` would read the largest id on the host, which a GPU would be waited for.
    """
    flat = expert_ids_TK.flatten().long().clamp(0, experts - 1)
    rows = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    return rows.index_add_(0, flat, torch.ones_like(flat))
