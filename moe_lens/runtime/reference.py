"""Every op in plain torch: the truth that the kernels and the CPU path are tested against.

Readable before quick, on any device. Inference only. Rows that no slot owns (from `ends_E[-1]` on)
are NaN here, the worst that the contract of an op allows, so that whoever reads one is found out.

T tokens, K top-k, E experts, D hidden, F an expert's intermediate size, S = T * K slots,
M runners-up of a token.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moe_lens.runtime.plan import Placed, Plan


def plan(expert_ids_TK: Tensor, experts: int) -> Plan:
    """Sort slots by expert, and within an expert by slot.

    Args:
        expert_ids_TK: int32 [T, K]; -1: no expert runs for this slot.
        experts: E.
    """
    ids_S = expert_ids_TK.reshape(-1).long()
    runs_S = ids_S >= 0
    # What does not run goes behind the last expert.
    group_S = torch.where(runs_S, ids_S, experts)
    order_S = torch.argsort(group_S, stable=True)
    place_S = torch.arange(len(ids_S), device=ids_S.device)
    row_S = torch.empty_like(place_S).scatter_(0, order_S, place_S)
    ends_E = _count(group_S, experts).cumsum(0)
    slot_S = torch.where(place_S < ends_E[-1], order_S, -1)
    row_S = torch.where(runs_S, row_S, -1)
    return Plan(
        row_S.reshape(expert_ids_TK.shape).to(torch.int32),
        slot_S.to(torch.int32),
        ends_E.to(torch.int32),
    )


def capacity(
    expert_ids_TK: Tensor,
    experts: int,
    room: int | Tensor,
    *,
    by: str = "position",
    priority_TK: Tensor | None = None,
    next_ids_TM: Tensor | None = None,
    next_priority_TM: Tensor | None = None,
) -> Placed:
    """Keep what fits into the experts, and reroute the rest to runners-up where there are any.

    Within an expert the first of an order are kept: slots as they come (`by="position"`, which is
    Megatron's order, since a token chooses an expert once), or the larger priority first and the
    lower slot among equals (`by="prob"`).

    With `next_ids_TM`, M rounds follow, in which no own choice is displaced: every slot without a
    place claims the next unused runner-up of its token (several slots of one token take consecutive
    ones, in slot order), and the claimants of an expert are taken in the same order, by slot or by
    `next_priority_TM`, while it has room. A claimed runner-up is used up whether or not the claim
    was met. What is left after the last round is dropped.

    Args:
        expert_ids_TK: int32 [T, K]; -1: no expert runs for this slot, and none will.
        experts: E.
        room: Slots that each expert takes, or int32 [E].
        by: "position" or "prob".
        priority_TK: float32 [T, K], never NaN; needed by "prob".
        next_ids_TM: int32 [T, M], best first; -1: no such runner-up.
        next_priority_TM: float32 [T, M]; needed by "prob" with `next_ids_TM`.
    """
    tokens, top_k = expert_ids_TK.shape
    ids_S = expert_ids_TK.reshape(-1).long()
    wants_S = ids_S >= 0
    room_E = torch.as_tensor(room, device=ids_S.device).long().expand(experts)
    priority_S = priority_TK.reshape(-1) if by == "prob" and priority_TK is not None else None
    kept_S = wants_S & _first(torch.where(wants_S, ids_S, experts), room_E, priority_S)
    placed_S = torch.where(kept_S, ids_S, -1)
    runner_up_S = torch.full_like(ids_S, -1)
    if next_ids_TM is None or next_ids_TM.shape[1] == 0 or len(ids_S) == 0:
        return _placed(placed_S, runner_up_S, expert_ids_TK)
    candidates = next_ids_TM.shape[1]
    used_T = torch.zeros(tokens, dtype=torch.long, device=ids_S.device)
    for _ in range(candidates):
        open_TK = (wants_S & (placed_S < 0)).reshape(tokens, top_k)
        # Consecutive runners-up for the open slots of a token, behind those it used before.
        claim_TK = used_T[:, None] + open_TK.cumsum(1) - 1
        asks_TK = open_TK & (claim_TK < candidates)
        claim_TK = claim_TK.clamp(0, candidates - 1)
        ids_TK = torch.where(asks_TK, next_ids_TM.long().gather(1, claim_TK), -1)
        asks_S = (ids_TK >= 0).reshape(-1)
        group_S = torch.where(asks_S, ids_TK.reshape(-1), experts)
        if by == "prob" and next_priority_TM is not None:
            priority_S = next_priority_TM.gather(1, claim_TK).reshape(-1)
        left_E = room_E - _count(torch.where(placed_S >= 0, placed_S, experts), experts)
        taken_S = asks_S & _first(group_S, left_E, priority_S)
        placed_S = torch.where(taken_S, group_S, placed_S)
        runner_up_S = torch.where(taken_S, claim_TK.reshape(-1), runner_up_S)
        used_T = used_T + open_TK.sum(1)
    return _placed(placed_S, runner_up_S, expert_ids_TK)


def permute(x_TD: Tensor, plan: Plan) -> Tensor:
    """The token of every row: [S, D]. Rows that no slot owns are NaN."""
    top_k = plan.row_TK.shape[1]
    slot_S = plan.slot_S.long()
    x_SD = x_TD[slot_S.clamp(min=0) // top_k]
    return torch.where((slot_S >= 0)[:, None], x_SD, torch.nan)


def grouped_mm(x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """`x @ w.T` with each expert's own rows and weights, as `F.linear` has them: [S, F].

    Multiplied in float32 and rounded once (float64 stays). Rows that no slot owns are NaN.
    """
    wide = _wide(x_SD)
    y_SF = x_SD.new_full((len(x_SD), w_EFD.shape[1]), torch.nan)
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        y_SF[begin:end] = (x_SD[begin:end].to(wide) @ w_EFD[expert].to(wide).T).to(y_SF.dtype)
        begin = end
    return y_SF


def swiglu(gate_up_S2F: Tensor, ends_E: Tensor | None = None) -> Tensor:
    """silu(gate) * up, gate being the first half: [S, F]. In float32, rounded once.

    With `ends_E`, rows that no slot owns are NaN.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    gate_SF, up_SF = gate_up_S2F.to(_wide(gate_up_S2F)).chunk(2, dim=-1)
    h_SF = (torch.nn.functional.silu(gate_SF) * up_SF).to(gate_up_S2F.dtype)
    if ends_E is not None:
        h_SF[int(ends_E[-1]) :] = torch.nan
    return h_SF


def combine(y_SD: Tensor, plan: Plan, weights_TK: Tensor) -> Tensor:
    """Each token's rows times its gate weights, summed in float32 in the order of its choices.

    Returns:
        [T, D] in the dtype of `y_SD`. Slots that no expert ran for add nothing.
    """
    tokens, top_k = plan.row_TK.shape
    wide = _wide(y_SD)
    sum_TD = torch.zeros(tokens, y_SD.shape[1], dtype=wide, device=y_SD.device)
    for k in range(top_k):
        row_T = plan.row_TK[:, k].long()
        y_TD = y_SD[row_T.clamp(min=0)].to(wide)
        part_TD = y_TD * weights_TK[:, k, None].to(wide)
        sum_TD += torch.where((row_T >= 0)[:, None], part_TD, 0.0)
    return sum_TD.to(y_SD.dtype)


def moe(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """The whole layer, op by op: [T, D]."""
    where = plan(expert_ids_TK, len(gate_up_E2FD))
    gate_up_S2F = grouped_mm(permute(x_TD, where), gate_up_E2FD, where.ends_E)
    y_SD = grouped_mm(swiglu(gate_up_S2F, where.ends_E), down_EDF, where.ends_E)
    return combine(y_SD, where, weights_TK)


def _wide(x: Tensor) -> torch.dtype:
    """What sums over `x` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _count(group_S: Tensor, experts: int) -> Tensor:
    """How many slots each expert has; `group_S` is `experts` where a slot has none."""
    count_E = torch.zeros(experts + 1, dtype=torch.long, device=group_S.device)
    return count_E.scatter_add_(0, group_S, torch.ones_like(group_S))[:experts]


def _first(group_S: Tensor, room_E: Tensor, priority_S: Tensor | None) -> Tensor:
    """Whether a slot is among the first `room_E` of its expert."""
    place_S = torch.arange(len(group_S), device=group_S.device)
    order_S = place_S
    if priority_S is not None:
        order_S = torch.sort(priority_S, descending=True, stable=True).indices
    order_S = order_S[torch.argsort(group_S[order_S], stable=True)]
    count_E = _count(group_S, len(room_E))
    begin_E = count_E.cumsum(0) - count_E
    # One more place, for the slots that have no expert: it has no room.
    begin_E = torch.cat([begin_E, begin_E.new_zeros(1)])
    room_E = torch.cat([room_E, room_E.new_zeros(1)])
    place_S = torch.empty_like(place_S).scatter_(0, order_S, place_S)
    return place_S - begin_E[group_S] < room_E[group_S]


def _placed(placed_S: Tensor, runner_up_S: Tensor, expert_ids_TK: Tensor) -> Placed:
    shape = expert_ids_TK.shape
    return Placed(
        placed_S.reshape(shape).to(torch.int32), runner_up_S.reshape(shape).to(torch.int32)
    )


def flush_l2(device: torch.device) -> None:
    """Read four times what a CUDA device's L2 cache holds, so that nothing else is left in it."""
    _four_times_l2(device).sum()


@cache
def _four_times_l2(device: torch.device) -> Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(4 * size // 8, dtype=torch.int64, device=device)
