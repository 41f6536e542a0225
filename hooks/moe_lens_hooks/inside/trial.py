"""A block run again, on the input and in the state that it had, with a part changed.

Legend: T tokens, D everything that the block gives back for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens_hooks.inside.bank import Bank
from moe_lens_hooks.inside.state import Snapshot, copied, without_hooks
from moe_lens_hooks.inside.watch import Place, Run, Watcher


@dataclass
class Call:
    """A call of a block, kept before it runs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: Snapshot

    @classmethod
    def of(
        cls, block: nn.Module, bank: Bank, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        """Copy what the block is given, and the state in which it is."""
        with torch.no_grad():
            before = Snapshot(block, [*bank.members, *bank.stacks])
            return cls(copied(args), copied(kwargs), before)


class Trials:
    """Runs a block again and again; see `trials`."""

    def __init__(self, block: nn.Module, bank: Bank, call: Call, lead: tuple[int, ...]) -> None:
        self.bank = bank
        self.hooks = False
        """Let the hooks of the block's children fire: where they change what it computes."""
        self._block, self._call, self._lead = block, call, lead

    def run(
        self,
        change: AbstractContextManager[Any] | None = None,
        edits: dict[Place, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Run, Rows]:
        """One run: what was found in it, and its output.

        Args:
            change: Entered while the block runs.
            edits: What to make of the tensors found at some places.
        """
        self._call.before.restore()
        args, kwargs = copied(self._call.args), copied(self._call.kwargs)
        run = Run(self._lead, self.bank.count, edits or {}, self.bank.uncalled)
        with ExitStack() as stack:
            if not self.hooks:
                stack.enter_context(without_hooks(self._block))
            stack.enter_context(change or nullcontext())
            stack.enter_context(self.bank.counted(run.calling))
            stack.enter_context(Watcher(run))
            output = self._block.forward(*args, **kwargs)
        return run, Rows.of(output, self._lead)


@contextmanager
def trials(block: nn.Module, bank: Bank, call: Call, lead: tuple[int, ...]) -> Iterator[Trials]:
    """Run a block again without a trace: state and random generators are put back at the end."""
    after = Snapshot(block, [*bank.members, *bank.stacks])
    device = next((x.device.type for x in block.parameters()), "cpu")
    autocast = torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,  # a weight cast without grad must not stay in the model's cache
    )
    try:
        with torch.no_grad(), autocast:
            yield Trials(block, bank, call, lead)
    finally:
        after.restore()


@dataclass
class Rows:
    """What a block gave back for each token.

    Attributes:
        x_TD: Every float tensor of its output that has a row per token, side by side.
        eps: Of the coarsest dtype among them.
    """

    x_TD: Tensor
    eps: float

    @classmethod
    def of(cls, output: Any, lead: tuple[int, ...]) -> Rows:
        tokens = torch.Size(lead).numel()
        parts = [x.detach() for x in _tensors(output) if x.is_floating_point()]
        parts = [x for x in parts if x.ndim > 1 and _per_token(x, lead, tokens)]
        if not parts:
            return cls(torch.zeros(tokens, 0, device="cpu"), 0.0)
        rows = torch.cat([x.reshape(tokens, -1).double() for x in parts], 1)
        return cls(rows, max(torch.finfo(x.dtype).eps for x in parts))

    @property
    def noise(self) -> float:
        """How far apart equal results may be: not at all, but on devices that add in any order."""
        if self.x_TD.device.type == "cpu" or not self.x_TD.numel():
            return 0.0
        return 8 * self.eps * float(self.x_TD.abs().amax())

    def differ(self, other: Rows) -> Tensor:
        """`[T]` bool, on the host: tokens for which two runs gave different outputs."""
        a, b = self.x_TD, other.x_TD
        same = (a == b) | ((a - b).abs() <= self.noise) | (a.isnan() & b.isnan())
        return ~same.all(1).cpu()


def _per_token(x: Tensor, lead: tuple[int, ...], tokens: int) -> bool:
    return tuple(x.shape[: len(lead)]) == lead or x.shape[0] == tokens


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list | dict):
        for v in x.values() if isinstance(x, dict) else x:
            yield from _tensors(v)
