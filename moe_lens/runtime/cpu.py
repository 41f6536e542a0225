"""The ops on a CPU, quick in their own right.

What an MoE layer loses on a CPU beside its matrix products is passes over memory, so every op makes
one: rows are gathered once, SwiGLU works in blocks that stay in cache, and the weighted sum over a
token's rows is one `embedding_bag`. Sorting is numpy's radix sort over as few bits as ids have.

T tokens, K top-k, E experts, D hidden, F an expert's intermediate size, S = T * K slots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_lens.runtime import reference
from moe_lens.runtime.checks import check_ids
from moe_lens.runtime.plan import Plan
from moe_lens.runtime.reference import capacity

__all__ = ["best_dtype", "capacity", "combine", "permute", "plan", "swiglu"]

BLOCK = 2**17
"""Elements of a block of SwiGLU for each thread: two in float32 take half of a 2 MiB cache."""


def best_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it in hardware (AMX, AVX-512 BF16), else float32."""
    has = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, name, bool)() for name in has)
    return torch.bfloat16 if fast else torch.float32


def plan(expert_ids_TK: Tensor, experts: int) -> Plan:
    """As `reference.plan`; ids out of range are refused here, since it costs nothing."""
    ids_S = expert_ids_TK.reshape(-1).numpy()
    slots = len(ids_S)
    # -1 becomes the largest number, behind every expert. One or two bytes are a radix sort.
    narrow = np.uint8 if experts < 2**8 else np.uint16 if experts < 2**16 else np.uint32
    slot_S = np.argsort(ids_S.astype(narrow), kind="stable").astype(np.int32)
    if slots and (int(ids_S.min()) < -1 or int(ids_S.max()) >= experts):
        check_ids(expert_ids_TK, experts)
    ends_E = np.bincount(ids_S + 1, minlength=experts + 1)[1:].cumsum(dtype=np.int32)
    row_S = np.empty(slots, np.int32)
    row_S[slot_S] = np.arange(slots, dtype=np.int32)
    runs = int(ends_E[-1])
    row_S[slot_S[runs:]] = -1
    slot_S[runs:] = -1
    row_TK = torch.from_numpy(row_S).reshape(expert_ids_TK.shape)
    return Plan(row_TK, torch.from_numpy(slot_S), torch.from_numpy(ends_E))


def permute(x_TD: Tensor, plan: Plan) -> Tensor:
    """As `reference.permute`; rows that no slot owns are not written."""
    runs = int(plan.ends_E[-1])
    x_SD = x_TD.new_empty(len(plan.slot_S), x_TD.shape[1])
    token_R = plan.slot_S[:runs].div(plan.row_TK.shape[1], rounding_mode="floor")
    torch.index_select(x_TD, 0, token_R, out=x_SD[:runs])
    return x_SD


def swiglu(gate_up_S2F: Tensor, ends_E: Tensor | None = None) -> Tensor:
    """As `reference.swiglu`; rows that no slot owns are not written."""
    if gate_up_S2F.dtype == torch.float64:
        return reference.swiglu(gate_up_S2F, ends_E)
    rows, width = gate_up_S2F.shape
    h_SF = gate_up_S2F.new_empty(rows, width // 2)
    step = max(1, BLOCK * torch.get_num_threads() // max(1, width // 2))
    runs = rows if ends_E is None else int(ends_E[-1])
    for begin in range(0, runs, step):
        end = min(begin + step, runs)
        gate, up = gate_up_S2F[begin:end].chunk(2, dim=1)
        # A copy either way: the product is made in place. Mixed dtypes would multiply slowly.
        wide = torch.nn.functional.silu(gate.to(torch.float32, copy=True), inplace=True)
        h_SF[begin:end] = wide.mul_(up.to(torch.float32))
    return h_SF


def combine(y_SD: Tensor, plan: Plan, weights_TK: Tensor) -> Tensor:
    """As `reference.combine`.

    `embedding_bag` sums a bag in float32 and in its order, but takes its weights in the dtype of
    the rows. A weight that needs more bits goes in as two, of which the second is what rounding
    left of the first: 16 bits of a bfloat16 pair, 22 of a float16 pair.
    """
    if y_SD.dtype == torch.float64:
        return reference.combine(y_SD, plan, weights_TK)
    tokens, top_k = plan.row_TK.shape
    if not tokens:
        return y_SD.new_empty(0, y_SD.shape[1])
    row_TK, weights_TK = plan.row_TK, weights_TK.float()
    begin_T = torch.arange(0, tokens * top_k, top_k, dtype=torch.int32)
    row_R, weight_R = row_TK.reshape(-1), weights_TK.reshape(-1)
    if int(plan.ends_E[-1]) < row_TK.numel():
        runs_TK = row_TK >= 0
        count_T = runs_TK.sum(1, dtype=torch.int32)
        begin_T = count_T.cumsum(0, dtype=torch.int32) - count_T
        row_R, weight_R = row_TK[runs_TK], weights_TK[runs_TK]
    high_R = weight_R.to(y_SD.dtype)
    low_R = (weight_R - high_R.float()).to(y_SD.dtype)
    if low_R.count_nonzero():
        row_R, high_R = row_R.repeat_interleave(2), torch.stack([high_R, low_R], 1).reshape(-1)
        begin_T = begin_T * 2
    return torch.nn.functional.embedding_bag(
        row_R, y_SD, begin_T, per_sample_weights=high_R, mode="sum"
    )
