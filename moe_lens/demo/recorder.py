"""What does the demo need of a recorder? The demo is handed one and never imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Recorder(Protocol):
    """The part of ``moe_lens.record``'s recorder that training and evaluation call."""

    def step(
        self, *, tags: Sequence[str], phase: Literal["train", "eval"]
    ) -> AbstractContextManager[Any]:
        """Enter one step; ``tags`` has the domain of each of the B sequences."""
        ...

    def loss(self, loss_BS: Tensor, /) -> Any:
        """Say the loss of each token, in nats, inside the step and after the forward."""
        ...

    def scalars(self) -> Mapping[str, float]:
        """Numbers of the last finished step, such as ``moe/layer0/dropped_share``."""
        ...
