"""What says which experts each layer is to choose: given ids, or a trace.

Legend: T tokens, K choices per token, B sequences (rows), S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lens_hooks.adapter import MoELayer, Observed
from moe_lens_hooks.steering.choice import OWN, Rechoose

Key = tuple[str, int]
"""A layer: the path of its block, and how often the block ran before in this forward."""

Give = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(ids `[T, K]`, gate weights `[T, K]`) that the experts would get, to those that they get."""

Ticket = Any
"""A forward, to the source that gave it out; asked for again when checkpointing runs it again."""


@dataclass
class Wanted:
    """What one layer is to do in one forward."""

    ids_TK: Tensor | None
    """int64, on the host; `OWN`: the router decides. None: as `edit` or `give` make them."""
    weights_TK: Tensor | None = None
    """float32, on the host; None: the router's own."""
    edit: Rechoose | None = None
    """Changes the router's choice when it is made."""
    give: Give | None = None
    """Changes what the experts are given."""
    saw: Callable[[Observed], None] | None = None
    """Called with what the block's taps saw, once it is through."""


class Source(Protocol):
    """Says what each layer is to choose."""

    name: str
    """For messages."""

    def begin(self, inputs: dict[str, Any]) -> Ticket:
        """A forward of the root module begins.

        Args:
            inputs: Its arguments by name.

        Raises:
            SteeringError: There are no decisions for it.
        """
        ...

    def wanted(
        self,
        layer: MoELayer,
        times: int,
        ticket: Ticket,
        shape: tuple[int, ...],
        token_T: Tensor | None,
    ) -> Wanted | None:
        """What a layer is to do; None: it is left alone.

        Args:
            layer: The layer.
            times: How often its block ran before in this forward.
            ticket: The forward.
            shape: Of the block's input but the last axis: (B, S) or (T,).
            token_T: Where the layer sees some of the tokens only, which.

        Raises:
            SteeringError: There are no decisions for it.
        """
        ...

    def end(self, ticket: Ticket, ran: set[Key]) -> tuple[int, int]:
        """The forward is over: tokens that were forced, valid tokens left to their routers.

        Raises:
            SteeringError: A layer that has decisions did not run.
        """
        ...

    def rewind(self) -> None:
        """The next forward is the first again."""
        ...


def check_ids(ids_TK: Tensor, layer: MoELayer, source: str) -> None:
    """Ids that the layer's experts can have.

    Raises:
        ValueError: They cannot.
    """
    info = layer.info
    experts = info.experts + info.zero_experts
    low, high = (int(x) for x in torch.aminmax(ids_TK)) if ids_TK.numel() else (0, 0)
    if low < OWN or high >= experts:
        raise ValueError(
            f"{source}: expert ids run from {low} to {high}, but {info.path} has {experts} experts."
        )
    if info.top_k is not None and ids_TK.shape[1] != info.top_k:
        raise ValueError(
            f"{source}: {ids_TK.shape[1]} ids per token, but {info.path} chooses {info.top_k}."
        )
