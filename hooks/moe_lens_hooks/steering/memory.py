"""Which forward a block runs again, when gradient checkpointing recomputes it in a backward pass.

A recomputation comes without its root module, in any order of micro-batches. It is known by its
input, which is that of the first run again. Runs of equal input are told apart by whether a
backward pass has been through them; where several still wait for theirs and were to choose other
experts, nothing tells which it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import SteeringError
from moe_lens_hooks.steering.source import Ticket, Wanted

_FORWARDS = 256
"""Runs of one block that are remembered: micro-batches whose backward has not come yet."""
_SAMPLES = 256
_CLOSE = 1e-2
"""Relative difference to the first run that recomputation on other kernels may make."""


@dataclass(eq=False)
class _Run:
    """A run of a block, `times` before in the forward of this ticket."""

    print: Tensor
    times: int
    ticket: Ticket
    decided: int
    """Equal for equal decisions."""
    spent: int | None = None
    """The backward pass that last ran it again."""


class Memory:
    """Remembers the runs of blocks that may be recomputed."""

    def __init__(self) -> None:
        self._runs: dict[nn.Module, deque[_Run]] = {}

    def keep(
        self, block: nn.Module, x: Tensor | None, times: int, ticket: Ticket, wanted: Wanted | None
    ) -> None:
        """A block runs with this input, `times` before in the forward of this ticket.

        Args:
            block: The block.
            x: Its input.
            times: How often it ran before in this forward.
            ticket: The forward.
            wanted: What it is to do.
        """
        if x is not None:
            runs = self._runs.setdefault(block, deque(maxlen=_FORWARDS))
            runs.append(_Run(_print_of(x), times, ticket, _decided(wanted)))

    def find(self, path: str, block: nn.Module, x: Tensor | None) -> tuple[int, Ticket]:
        """(times, ticket) of the run that is being done again.

        Raises:
            SteeringError: No remembered run had this input, or several that chose other experts.
        """
        runs = self._runs.get(block, ())
        alike = [] if x is None else _nearest(list(runs), _print_of(x))
        if not alike:
            raise SteeringError(
                f"{path} runs in a backward pass, but its input is that of none of the last "
                f"{len(runs)} forwards. Run checkpointed forwards and their backward pass in one "
                "force_routing."
            )
        now = torch._C._current_graph_task_id()
        alike = [r for r in alike if r.spent in (None, now)] or alike
        if len({r.decided for r in alike}) > 1:
            raise SteeringError(
                f"{path} runs again in a backward pass, with an input that {len(alike)} forwards "
                "gave it, which were forced to different experts: which of them this is cannot be "
                "told. Run the backward pass of each before the next forward of the same batch."
            )
        run = next((r for r in reversed(alike) if r.spent is None), alike[-1])
        run.spent = now
        return run.times, run.ticket


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments: a block's input."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return next((x for x in tensors if x.is_floating_point()), None)


def _nearest(runs: list[_Run], mark: Tensor) -> list[_Run]:
    """The runs whose input is nearest to this one, oldest first; none where no input is near."""
    runs = [r for r in runs if (r.print.shape, r.print.device) == (mark.shape, mark.device)]
    if not runs:
        return []
    prints = torch.stack([r.print for r in runs])
    apart = (prints - mark).abs().amax(1)
    far = torch.where((prints == mark).all(1), 0.0, apart).nan_to_num(nan=torch.inf).tolist()
    least, scale = min(far), float(mark.abs().max()) or 1.0
    if least == torch.inf or not least <= _CLOSE * scale:
        return []
    return [run for run, d in zip(runs, far, strict=True) if d == least]


def _decided(wanted: Wanted | None) -> int:
    if wanted is None:
        return 0
    parts = [x for x in (wanted.ids_TK, wanted.weights_TK) if x is not None]
    return hash(tuple(x.numpy().tobytes() for x in parts))


def _print_of(x: Tensor) -> Tensor:
    """A few numbers that tell inputs apart: a sample and the size."""
    flat = x.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    sample = flat[::step][:_SAMPLES].float()
    return torch.cat([sample, flat.sum(dtype=torch.float32)[None]])
