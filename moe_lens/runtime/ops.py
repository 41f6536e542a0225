"""The ops of an MoE layer, each sent to the kernels, the CPU path or the reference.

A tensor on a CUDA device goes to the hand-written kernels (`moe_lens.runtime.cuda`), on a CPU to
the quick path (`moe_lens.runtime.cpu`); `reference=True` takes the plain torch of
`moe_lens.runtime.reference`, which also documents each op, on any device. Shapes and dtypes are
checked here, values are not: `checks.check_ids` does that where a workload is built.

T tokens, K top-k, E experts, D hidden, F an expert's intermediate size, S = T * K slots,
M runners-up of a token.
"""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime import checks, cpu
from moe_lens.runtime import reference as plain
from moe_lens.runtime.plan import Placed, Plan


def plan(expert_ids_TK: Tensor, experts: int, *, reference: bool = False) -> Plan:
    """Sort slots by expert, and within an expert by slot.

    Raises:
        RuntimeInputError: Not int32 [T, K], or K outside 1..E.
    """
    checks.check_plan(expert_ids_TK, experts)
    return cast("Plan", _home(expert_ids_TK, reference).plan(expert_ids_TK, experts))


def capacity(
    expert_ids_TK: Tensor,
    experts: int,
    room: int | Tensor,
    *,
    by: str = "position",
    priority_TK: Tensor | None = None,
    next_ids_TM: Tensor | None = None,
    next_priority_TM: Tensor | None = None,
    reference: bool = False,
) -> Placed:
    """Keep what fits into the experts, reroute the rest to runners-up: `reference.capacity`.

    Raises:
        RuntimeInputError: A shape or dtype that does not fit, or "prob" without priorities.
    """
    checks.check_capacity(
        expert_ids_TK, experts, room, by, priority_TK, next_ids_TM, next_priority_TM
    )
    placed = _home(expert_ids_TK, reference).capacity(
        expert_ids_TK,
        experts,
        room,
        by=by,
        priority_TK=priority_TK,
        next_ids_TM=next_ids_TM,
        next_priority_TM=next_priority_TM,
    )
    return cast("Placed", placed)


def permute(x_TD: Tensor, plan: Plan, *, reference: bool = False) -> Tensor:
    """The token of every row: [S, D]. Rows from `plan.ends_E[-1]` on may hold anything."""
    if x_TD.dim() != 2 or len(x_TD) != len(plan.row_TK):
        raise RuntimeInputError(
            f"x must be [{len(plan.row_TK)}, hidden] as the ids are, got {list(x_TD.shape)}"
        )
    return cast("Tensor", _home(x_TD, reference).permute(x_TD, plan))


def grouped_mm(
    x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor, *, backend: str | None = None
) -> Tensor:
    """`x @ w.T` with each expert's own rows and weights, as `F.linear` has them: [S, F].

    Args:
        x_SD: Rows sorted by expert. Those from `ends_E[-1]` on are not read.
        w_EFD: One weight matrix an expert, [F, D].
        ends_E: int32, row after the last one of each expert.
        backend: "reference", "loop", "grouped_mm" or "triton"; without it, "loop" on a CPU and
            `gemm.choice` on a CUDA device.

    Returns:
        In the dtype of `x_SD`. Rows from `ends_E[-1]` on may hold anything.

    Raises:
        RuntimeInputError: Shapes do not fit, or the backend does not run here.
    """
    from moe_lens.runtime import gemm

    if x_SD.dim() != 2 or w_EFD.dim() != 3 or x_SD.shape[1] != w_EFD.shape[2]:
        raise RuntimeInputError(
            f"x [rows, hidden] and w [experts, out, hidden] do not fit: {list(x_SD.shape)}, "
            f"{list(w_EFD.shape)}"
        )
    if backend == "reference":
        return plain.grouped_mm(x_SD, w_EFD, ends_E)
    return gemm.grouped_mm(x_SD, w_EFD, ends_E, backend)


def swiglu(gate_up_S2F: Tensor, ends_E: Tensor | None = None, *, reference: bool = False) -> Tensor:
    """silu(gate) * up, gate being the first half: [S, F]. In float32, rounded once.

    With `ends_E`, rows from `ends_E[-1]` on are not read, and may hold anything afterwards.
    """
    if gate_up_S2F.dim() != 2 or gate_up_S2F.shape[1] % 2:
        raise RuntimeInputError(
            f"gate and up must be [rows, 2 * intermediate], got {list(gate_up_S2F.shape)}"
        )
    return cast("Tensor", _home(gate_up_S2F, reference).swiglu(gate_up_S2F, ends_E))


def combine(y_SD: Tensor, plan: Plan, weights_TK: Tensor, *, reference: bool = False) -> Tensor:
    """Each token's rows times its gate weights, summed in float32 in the order of k: [T, D].

    Slots that no expert ran for add nothing, whatever their weight is. Gate weights in float64
    are rounded to float32 where sums are float32.

    Raises:
        RuntimeInputError: Weights or rows that are not the plan's.
    """
    if weights_TK.shape != plan.row_TK.shape or not weights_TK.is_floating_point():
        raise RuntimeInputError(
            f"weights must be floating point {list(plan.row_TK.shape)} as the ids are, got "
            f"{weights_TK.dtype} {list(weights_TK.shape)}"
        )
    if y_SD.dim() != 2 or len(y_SD) != plan.row_TK.numel():
        raise RuntimeInputError(
            f"y must be [{plan.row_TK.numel()}, hidden], a row a slot, got {list(y_SD.shape)}"
        )
    if weights_TK.dtype == torch.float64 and y_SD.dtype != torch.float64:
        weights_TK = weights_TK.float()
    return cast("Tensor", _home(y_SD, reference).combine(y_SD, plan, weights_TK))


def flush_l2(device: torch.device) -> None:
    """Push what a CUDA device has in its L2 cache out of it; on a CPU nothing happens."""
    if device.type != "cuda":
        return
    try:
        _kernels().flush_l2(device)
    except RuntimeUnavailable:
        plain.flush_l2(device)


def _home(tensor: Tensor, reference: bool) -> ModuleType:
    if reference:
        return plain
    if tensor.is_cuda:
        return _kernels()
    if tensor.device.type == "cpu":
        return cpu
    return plain  # on any other device plain torch is what there is


def _kernels() -> ModuleType:
    from moe_lens.runtime.cuda import kernels

    return kernels
