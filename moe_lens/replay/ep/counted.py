"""What each rank of a group has to do in a forward, as rows of a result without their times.

T tokens, K choices of a token, P slots, R ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.ep.groups import Batch
from moe_lens.replay.ep.workload import Ints, Workload, workloads
from moe_lens.replay.placement.plan import Placement, slots_of
from moe_lens.replay.placement.traffic import sent, sources

Row = dict[str, Any]
"""A row of `moe_lens.trace.schema.REPLAY_EP`, by column."""


@dataclass(frozen=True)
class Width:
    """Bytes of a row on its way to an expert, and of one that comes back."""

    dispatch: int
    combine: int


@dataclass(frozen=True)
class Spread:
    """A batch, spread over ranks.

    Attributes:
        slot_TK: The slot that computes each choice; -1: none.
        source_T: The rank on which each token starts.
        parts: What each rank computes.
        rows_RR: Rows from each rank to each in dispatch; the diagonal stays at home.
        rows_NN: The same between nodes.
    """

    slot_TK: NDArray[np.int32]
    source_T: Ints
    parts: list[Workload]
    rows_RR: Ints
    rows_NN: Ints


def spread(batch: Batch, placement: Placement, *, dedup: bool) -> Spread:
    """Spread a batch over the ranks of a placement.

    A token starts on the rank that recorded it, where the trace has as many ranks as the placement;
    otherwise the tokens of the forward are dealt out to the ranks in equal parts, in their order.

    Raises:
        ReplayError: The placement is of another model.
    """
    slots_P = placement.of_layer(batch.layer, placement.experts)
    slot_TK = slots_of(batch.expert_ids_TK, slots_P, placement.experts)
    source_T = batch.recorder_T
    if batch.recorders == 1 or batch.recorders != placement.ranks:
        source_T = sources(batch.tokens, placement.ranks)
    rows = sent(slot_TK, source_T, placement)
    return Spread(
        slot_TK,
        source_T,
        workloads(
            slot_TK, batch.weights_TK, placement.ranks, placement.slots_per_rank, dedup=dedup
        ),
        rows.ranks_RR if dedup else rows.choices_RR,
        rows.nodes_NN if dedup else rows.choices_NN,
    )


def counted(batch: Batch, over: Spread, placement: Placement, width: Width) -> list[Row]:
    """A row for each rank: its place, its rows, and what it sends and receives."""
    away_RR = over.rows_RR - np.diag(np.diag(over.rows_RR))
    sent_R, received_R = away_RR.sum(axis=1).tolist(), away_RR.sum(axis=0).tolist()
    return [
        {
            "placement": placement.method,
            "layer": batch.layer,
            "step": batch.step,
            "forward": batch.forward,
            "phase": batch.phase,
            "ep_rank": rank,
            "ep_ranks": placement.ranks,
            "tokens": batch.tokens,
            "rows": part.rows,
            "arrived": len(part.token_N),
            "touched": part.touched,
            "sent_rows": sent_R[rank],
            "sent_bytes": sent_R[rank] * width.dispatch,
            "received_rows": received_R[rank],
            "received_bytes": received_R[rank] * width.dispatch,
        }
        for rank, part in enumerate(over.parts)
    ]
