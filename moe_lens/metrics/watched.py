"""One layer in one phase as the alarms see it, and what an alarm that fires says.

Legend: C blocks of consecutive steps, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_lens.metrics.chance import Chance, Floats, Ints
from moe_lens.metrics.drift import design_effect


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One layer in one phase. None: not recorded.

    Attributes:
        layer: Its number.
        top_k: Choices of a token, on average.
        counts_CE: Choices of each expert.
        z_loss_C: Mean z-loss.
        entropy_C: Mean token entropy, nats.
        dropped: Share of choices that no expert computed.
        dropped_by_chance: The same of a uniform router at the same capacity.
        experts_choose: Loads are equal by construction.
        steps_C: What a block is of, as step 64.
        unit: What a block is.
        against: The same layer of the run with which this one is compared; None: a run is compared
            with its own past.
    """

    layer: int
    top_k: float
    counts_CE: Ints
    z_loss_C: Floats | None = None
    entropy_C: Floats | None = None
    dropped: float | None = None
    dropped_by_chance: Chance | None = None
    experts_choose: bool = False
    steps_C: tuple[str, ...] = ()
    unit: str = "blocks of steps"
    against: Watched | None = None

    @property
    def experts(self) -> int:
        """E."""
        return int(self.counts_CE.shape[1])

    @cached_property
    def counts_E(self) -> Ints:
        """Of the whole phase."""
        return np.asarray(self.counts_CE.sum(0))

    @cached_property
    def tokens_C(self) -> Floats:
        """Tokens of each block."""
        return np.asarray(self.counts_CE.sum(1) / self.top_k)

    @property
    def blocks(self) -> int:
        """C, without those in which the layer saw no token."""
        return int((self.tokens_C > 0).sum())

    @cached_property
    def design_effect(self) -> float:
        """How many tokens are worth one independent token."""
        return design_effect(self.counts_CE, self.tokens_C)

    @property
    def effective_tokens(self) -> float:
        """Independent tokens that would vary as much."""
        return float(self.tokens_C.sum() / self.design_effect)


@dataclass(frozen=True)
class Fired:
    """An alarm that fired in a layer.

    Attributes:
        alarm: Its name.
        layer: Where.
        expert: Which, if it is about one.
        value: What was found, in the alarm's unit.
        threshold: What it may be.
        message: One sentence.
    """

    alarm: str
    layer: int
    expert: int | None
    value: float
    threshold: float
    message: str
