"""What the routing work of an MoE layer comes to: where rows lie, and what a capacity left.

T tokens, K choices of a token (top-k), E experts, S = T * K slots; slot s is choice s % K of token
s // K. Every size depends on T, K and E alone, never on what was routed, so that a CUDA graph that
was captured for one routing can be replayed for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Where the row of every slot lies. int32 tensors, all on one device.

    Rows are sorted by expert, and within an expert by slot, so a token that comes first in the
    batch comes first in its experts.

    Attributes:
        row_TK: Row of each slot; -1: no expert runs for it.
        slot_S: Slot of each row. Rows from `ends_E[-1]` on belong to no slot and hold -1.
        ends_E: Row after the last one of each expert, cumulative: `offs` of torch's `grouped_mm`.
    """

    row_TK: Tensor
    slot_S: Tensor
    ends_E: Tensor


@dataclass(frozen=True)
class Placed:
    """What a capacity left of the router's choices. int32 tensors, all on one device.

    Attributes:
        expert_ids_TK: The expert that runs for each slot; -1: dropped.
        runner_up_TK: Which of its token's runners-up (0 to M-1) took the slot; -1: none did, the
            slot has its own choice or was dropped.
    """

    expert_ids_TK: Tensor
    runner_up_TK: Tensor
