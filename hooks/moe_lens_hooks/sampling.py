"""Which sequences keep per-token rows. Counts are always on; rows are a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampling:
    """Keep the rows of a share of the sequences, in every n-th step.

    Attributes:
        share: Share of sequences, 0 to 1. Which ones depends on their number alone, so a sequence
            is kept in all its forwards, or in none.
        every: Only steps whose number is a multiple of this.
    """

    share: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"tokens={self.share} must be a share of sequences, 0 to 1")
        if self.every < 1:
            raise ValueError(f"every({self.every}) must be 1 or more steps")

    def keeps(self, step: int, sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each sequence number, whether its rows are kept in this step."""
        if self.share == 0.0 or step % self.every:
            return np.zeros(len(sequences), bool)
        if self.share == 1.0:
            return np.ones(len(sequences), bool)
        mixed = (sequences.astype(np.uint64) + np.uint64(1)) * _MIX  # wraps: a hash, not a sum
        mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX
        uniform = (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        kept: NDArray[np.bool_] = uniform < self.share
        return kept

    def __str__(self) -> str:
        if self.share == 0.0:
            return "none"
        sequences = "all sequences" if self.share == 1.0 else f"{self.share:.3%} of sequences"
        return sequences if self.every == 1 else f"{sequences} in every {self.every}th step"


def every(steps: int, share: float = 1.0) -> Sampling:
    """Keep per-token rows in every n-th step only: `record(..., tokens=every(100))`."""
    return Sampling(share, steps)


def as_sampling(tokens: float | Sampling) -> Sampling:
    """A share as a `Sampling`."""
    return tokens if isinstance(tokens, Sampling) else Sampling(float(tokens))
