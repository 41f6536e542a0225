"""What each rank of an expert-parallel group computes of one layer in one forward.

A token arrives once at each rank that has any of its choices (deduplicated dispatch, as DeepEP's),
or once for each of its choices. Rows of all ranks together are exactly those of the forward.

T tokens, K choices of a token, N rows that arrive at a rank, J = min(K, slots of a rank) choices
that a token can have there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.routing import Floats, Ids

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """The part of a forward that one rank computes.

    Attributes:
        token_N: The token of each row that arrives, in order.
        slots_NJ: int32, slots of this rank, from 0; -1: none.
        choice_NJ: Which of its token's choices each is, from 0; -1: none.
        weights_NJ: float32 gate weights. Without deduplication 1: the token's own rank weighs.
    """

    token_N: Ints
    slots_NJ: Ids
    choice_NJ: Ids
    weights_NJ: Floats

    @property
    def rows(self) -> int:
        """Rows that experts compute."""
        return int((self.slots_NJ >= 0).sum())

    @property
    def touched(self) -> int:
        """Slots that compute something."""
        return len(np.unique(self.slots_NJ[self.slots_NJ >= 0]))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for workloads that take equally long: weights and tokens are only values."""
        return self.slots_NJ.shape, self.slots_NJ.tobytes()


def workload(
    slot_TK: Ids, weights_TK: Floats, rank: int, slots_per_rank: int, *, dedup: bool
) -> Workload:
    """The part of one rank.

    Args:
        slot_TK: The slot of each choice over all ranks (`plan.slots_of`); -1: none.
        weights_TK: Gate weights.
        rank: Which.
        slots_per_rank: Of each rank.
        dedup: A token arrives once.
    """
    here_TK = slot_TK // slots_per_rank == rank  # -1 stays -1
    if not dedup:
        token_N, choice_N = np.nonzero(here_TK)
        slots_N1 = slot_TK[token_N, choice_N][:, None] - rank * slots_per_rank
        ones_N1 = np.ones((len(token_N), 1), np.float32)
        return Workload(
            token_N, slots_N1.astype(np.int32), choice_N[:, None].astype(np.int32), ones_N1
        )
    token_N = np.flatnonzero(here_TK.any(axis=1))
    here_NK = here_TK[token_N]
    # Its own choices first, in their order: what is here fits into J columns.
    width = min(slot_TK.shape[1], slots_per_rank)
    order_NJ = np.argsort(~here_NK, axis=1, kind="stable")[:, :width]
    real_NJ = np.take_along_axis(here_NK, order_NJ, axis=1)
    slots_NJ = np.take_along_axis(slot_TK[token_N], order_NJ, axis=1) - rank * slots_per_rank
    return Workload(
        token_N,
        np.where(real_NJ, slots_NJ, -1).astype(np.int32),
        np.where(real_NJ, order_NJ, -1).astype(np.int32),
        np.where(real_NJ, np.take_along_axis(weights_TK[token_N], order_NJ, axis=1), 0).astype(
            np.float32
        ),
    )


def workloads(
    slot_TK: Ids, weights_TK: Floats, ranks: int, slots_per_rank: int, *, dedup: bool
) -> list[Workload]:
    """The part of each rank."""
    return [workload(slot_TK, weights_TK, r, slots_per_rank, dedup=dedup) for r in range(ranks)]
