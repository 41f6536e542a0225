"""What was measured: losses token by token, without a change and with one.

Legend: B sequences, S positions, N tokens that have a loss, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.schema import UNTAGGED
from moe_lens_hooks.steering.token_losses import Batch

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


@dataclass(repr=False)
class Layer:
    """What one layer's router did with a batch.

    Attributes:
        info: The layer; `info.layer` is its number in call order.
        expert_ids_BSK: As the experts got them. Empty where the layer sees other tokens.
        margin_BS: Worst score chosen minus best one left, in the router's own score; NaN unknown.
        entropy_BS: Of the router's full distribution, nats; NaN unknown.
        why_not: Why its choice cannot be changed; None: it can.
    """

    info: LayerInfo
    expert_ids_BSK: NDArray[np.int64]
    margin_BS: Floats
    entropy_BS: Floats
    why_not: str | None = None

    def __repr__(self) -> str:
        experts = self.info.experts + self.info.zero_experts
        changes = "" if self.why_not is None else ", its choice cannot be changed"
        return f"Layer({self.info.layer}: {self.info.path}, {experts} experts{changes})"

    @property
    def aligned(self) -> bool:
        """It routes the tokens that the losses are of."""
        return len(self.expert_ids_BSK) > 0


@dataclass(repr=False)
class Base:
    """A batch as the model routes it; what `Interventions.measure` returns.

    Attributes:
        loss_BS: Loss of each token; NaN where it has none.
        tags_B: Tag of each sequence.
        layers: By number in call order.
        self_test: Forwards that were repeated with their own choices forced, equal bit for bit.
    """

    loss_BS: Floats
    tags_B: NDArray[np.str_]
    layers: list[Layer]
    self_test: int
    inputs: Batch
    pieces: list[torch.Tensor]
    """Which sequences run together: all forwards use the same pieces."""

    def __repr__(self) -> str:
        B, S = self.loss_BS.shape
        known = self.loss_BS[self.tokens].astype(np.float64)
        mean = f"mean loss {known.mean():.4f}" if len(known) else "no loss"
        return (
            f"Base({B} x {S} tokens, {len(known)} with a loss, {mean}; {len(self.layers)} MoE "
            "layers, reproduced bit for bit)"
        )

    @property
    def tokens(self) -> Bools:
        """Tokens that have a loss, bool `[B, S]`."""
        known: Bools = np.isfinite(self.loss_BS)
        return known


@dataclass(repr=False)
class Change:
    """What an intervention does to the loss of each token that has one.

    Attributes:
        sequence_N: Sequence in the batch.
        position_N: Position in it.
        tag_N: The sequence's tag.
        base_N: Loss as the model routes by itself.
        loss_N: Loss under the intervention.
        affected_N: The token's own experts, or their weights, were changed; the loss of others
            changes by what they attend to.
    """

    sequence_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    tag_N: NDArray[np.str_]
    base_N: Floats
    loss_N: Floats
    affected_N: Bools

    def __repr__(self) -> str:
        return (
            f"Change(mean {self.mean:+.4f} over {len(self.base_N)} tokens, "
            f"{int(self.affected_N.sum())} of them affected)"
        )

    @property
    def delta_N(self) -> Floats:
        """What the intervention costs: above zero where the loss is higher than without it."""
        cost: Floats = self.loss_N.astype(np.float64) - self.base_N
        return cost

    @property
    def mean(self) -> float:
        """Mean of `delta_N`; NaN without tokens."""
        return float(self.delta_N.mean()) if len(self.base_N) else float("nan")

    def columns(self) -> dict[str, NDArray[Any]]:
        """All of it by name, a row a token: `pandas.DataFrame(change.columns())`."""
        return {
            "sequence": self.sequence_N,
            "position": self.position_N,
            "tag": self.tag_N,
            "base_loss": self.base_N,
            "loss": self.loss_N,
            "delta": self.delta_N,
            "affected": self.affected_N,
        }


def change_of(base: Base, loss_BS: Floats, affected_BS: Bools) -> Change:
    """The tokens that have a loss."""
    sequence_N, position_N = np.nonzero(base.tokens)
    return Change(
        sequence_N,
        position_N,
        base.tags_B[sequence_N],
        base.loss_BS[base.tokens],
        loss_BS[base.tokens],
        affected_BS[base.tokens],
    )


def tags_of(tags: list[str] | None, sequences: int) -> NDArray[np.str_]:
    """The tag of each sequence; the trace's word for none."""
    return np.array([UNTAGGED] * sequences if tags is None else tags, dtype=np.str_)
