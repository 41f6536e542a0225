"""A forward in which layers are looked at, or changed, by their number in call order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.source import Key, Ticket, Wanted

Make = Callable[[int, MoELayer, Tensor | None], Wanted | None]
"""(number of the layer, the layer, which tokens it sees if not all) to what it is to do."""


class Planned:
    """The source of decisions of an intervention.

    Args:
        make: Says what each layer is to do.
        end: Called when the forward is over, with the number of layers that ran.
    """

    name = "the intervention"

    def __init__(self, make: Make, end: Callable[[int], None]) -> None:
        self._make, self._end = make, end
        self._ran = 0

    def begin(self, inputs: dict[str, Any]) -> Ticket:
        self._ran = 0

    def wanted(
        self,
        layer: MoELayer,
        times: int,
        ticket: Ticket,
        shape: tuple[int, ...],
        token_T: Tensor | None,
    ) -> Wanted | None:
        number, self._ran = self._ran, self._ran + 1
        return self._make(number, layer, token_T)

    def end(self, ticket: Ticket, ran: set[Key]) -> tuple[int, int]:
        self._end(self._ran)
        return 0, 0

    def rewind(self) -> None:
        """Nothing to do: each forward is like the first."""
