"""Dispatch and combine between processes, over `torch.distributed.all_to_all_single`.

One path for NCCL on GPUs and gloo on CPUs. Counts go first, since a rank does not know what others
send it: one wait of the host for each dispatch. Deduplicated, a token goes once to each rank that
has any of its choices, with its slots there and their gate weights; that rank sums them to one row,
and the token's own rank adds up the rows of all ranks, in the order of ranks, in float32. Otherwise
a row goes out and comes back for each choice, and the token's own rank weighs and sums.

T tokens of a rank, K choices of a token, S rows that a rank sends, N rows that arrive at it,
J choices of a row, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_lens.replay.ep.workload import workloads
from moe_lens.replay.routing import Floats, Ids


@dataclass(frozen=True)
class Route:
    """What a rank sends of its own tokens.

    Attributes:
        tokens: T.
        top_k: K.
        counts: Rows to each rank.
        token_S: The token of each row, by rank and within it by token.
        slots_SJ: int32, slots of the receiving rank; -1: none.
        weights_SJ: float32; without deduplication 1.
        choice_S: Without deduplication, each row's place among the T * K choices.
        weight_S: Without deduplication, the gate weight of that choice.
    """

    tokens: int
    top_k: int
    dedup: bool
    counts: list[int]
    token_S: Tensor
    slots_SJ: Tensor
    weights_SJ: Tensor
    choice_S: Tensor
    weight_S: Tensor


@dataclass(frozen=True)
class Arrived:
    """What a rank received.

    Attributes:
        x_ND: Rows.
        slots_NJ: int32, slots of this rank; -1: none.
        weights_NJ: float32.
        counts: Rows from each rank.
    """

    x_ND: Tensor
    slots_NJ: Tensor
    weights_NJ: Tensor
    counts: list[int]


def route(
    slot_TK: Ids,
    weights_TK: Floats,
    ranks: int,
    slots_per_rank: int,
    *,
    dedup: bool,
    device: torch.device,
) -> Route:
    """Where a rank's own tokens go.

    Args:
        slot_TK: The slot of each choice over all ranks; -1: none.
        weights_TK: Gate weights.
        ranks: Of the group.
        slots_per_rank: Of each.
        dedup: A token goes once to a rank.
        device: Where rows are.
    """
    parts = workloads(slot_TK, weights_TK, ranks, slots_per_rank, dedup=dedup)
    tokens, top_k = slot_TK.shape
    token_S = np.concatenate([part.token_N for part in parts])
    choice_S = token_S * top_k + np.concatenate([part.choice_NJ[:, 0] for part in parts])

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Route(
        tokens=tokens,
        top_k=top_k,
        dedup=dedup,
        counts=[len(part.token_N) for part in parts],
        token_S=on_device(token_S),
        slots_SJ=on_device(np.concatenate([part.slots_NJ for part in parts])),
        weights_SJ=on_device(np.concatenate([part.weights_NJ for part in parts])),
        choice_S=on_device(choice_S),
        weight_S=on_device(weights_TK.reshape(-1)[choice_S]),
    )


def dispatch(x_TD: Tensor, to: Route, group: dist.ProcessGroup | None = None) -> Arrived:
    """Send this rank's tokens to their experts, and receive those for its own.

    Args:
        x_TD: This rank's tokens.
        to: Where they go.
        group: Of processes; None: all.
    """
    sent = torch.tensor(to.counts, dtype=torch.int64, device=x_TD.device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    counts: list[int] = received.tolist()  # the one wait of the host: how much memory to take
    rows, width = sum(counts), to.slots_SJ.shape[1]
    x_ND = x_TD.new_empty(rows, x_TD.shape[1])
    dist.all_to_all_single(x_ND, x_TD[to.token_S], counts, to.counts, group=group)
    # Slots and weights in one message: both have four bytes.
    about_S2J = torch.cat([to.slots_SJ, to.weights_SJ.view(torch.int32)], dim=1)
    about_N2J = about_S2J.new_empty(rows, 2 * width)
    dist.all_to_all_single(about_N2J, about_S2J, counts, to.counts, group=group)
    slots_NJ = about_N2J[:, :width].contiguous()
    weights_NJ = about_N2J[:, width:].contiguous().view(torch.float32)
    return Arrived(x_ND, slots_NJ, weights_NJ, counts)


def combine(
    y_ND: Tensor, arrived: Arrived, to: Route, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Send results back, and sum those of this rank's own tokens.

    Args:
        y_ND: What this rank's experts made of the rows that arrived.
        arrived: Those rows.
        to: Where this rank's tokens went.
        group: Of processes; None: all.

    Returns:
        [T, D], of `y_ND`'s dtype, summed in float32.
    """
    back_SD = y_ND.new_empty(sum(to.counts), y_ND.shape[1])
    dist.all_to_all_single(back_SD, y_ND.contiguous(), to.counts, arrived.counts, group=group)
    out_TD = torch.zeros(to.tokens, y_ND.shape[1], dtype=torch.float32, device=y_ND.device)
    if to.dedup:
        token_parts, back_parts = (
            torch.split(to.token_S, to.counts),
            torch.split(back_SD, to.counts),
        )
        for token_M, rows_MD in zip(token_parts, back_parts, strict=True):
            out_TD[token_M] += rows_MD.float()  # a token stands once among a rank's rows
        return out_TD.to(y_ND.dtype)
    choices_XD = out_TD.new_zeros(to.tokens * to.top_k, y_ND.shape[1])
    choices_XD[to.choice_S] = back_SD.float() * to.weight_S[:, None]
    out_TD = choices_XD.view(to.tokens, to.top_k, y_ND.shape[1]).sum(dim=1)
    return out_TD.to(y_ND.dtype)
