"""The ops of an MoE layer as CUDA kernels: what `moe_lens.runtime.reference` says, on a device.

Called through `moe_lens.runtime.ops`, which has checked shapes and dtypes as every home of the ops
needs them. Refused here is what the kernels alone do not take: sizes, and dtypes of numbers.

Nothing here waits for the device, and what is allocated depends on shapes alone: after one call
that loads the kernels, everything can be captured in a CUDA graph. The result is the same, bit for
bit, every time. Inference only.

T tokens, K top-k, E experts, D hidden, F an expert's intermediate size, S = T * K slots,
M runners-up of a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime.cuda.launch import launch
from moe_lens.runtime.plan import Placed, Plan

MAX_EXPERTS = 2048
"""Counts of all experts lie in the 48 KB of shared memory that every device has."""
MAX_TOP_K = 64
MAX_SLOTS = 2**30
"""So that no sum of a slot and a block's size leaves int32."""

SMALL = 4096
"""Slots up to which one block makes the plan. Not more than an unsigned short counts."""
CHUNK = 256
MAX_CHUNKS = 1024

_WIDTHS = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
"""Numbers in 16 bytes, for each dtype that the kernels compute with."""
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_flushed: dict[torch.device, Tensor] = {}


def plan(expert_ids_TK: Tensor, experts: int) -> Plan:
    """Sort slots by expert, and within an expert by slot.

    Args:
        expert_ids_TK: int32 [T, K]; -1 (and what is no expert): no expert runs for this slot.
        experts: E, at most `MAX_EXPERTS`.

    Raises:
        RuntimeInputError: More experts, choices or slots than the kernels take.
        RuntimeUnavailable: The kernels cannot be compiled or loaded.
    """
    tokens, top_k = _check_sizes(expert_ids_TK, experts)
    ids_TK = expert_ids_TK.contiguous()
    device, slots = ids_TK.device, tokens * top_k
    row_TK = torch.empty_like(ids_TK)
    slot_S = torch.empty(slots, dtype=torch.int32, device=device)
    ends_E = torch.empty(experts, dtype=torch.int32, device=device)
    if slots <= SMALL:
        # Counts of all warps fit into 32 KB; few slots need few warps.
        warps = min(32, max(4, _ceil(slots, 32)), 16384 // experts)
        span = _ceil(slots, warps * 128) * 128
        shared = 4 * experts + 2 * warps * experts
        arguments = (ids_TK, slots, experts, span, row_TK, slot_S, ends_E)
        launch("moe_plan_small", (1, 1), 32 * warps, *arguments, device=device, shared=shared)
        return Plan(row_TK, slot_S, ends_E)
    chunk = _ceil(_ceil(slots, MAX_CHUNKS), CHUNK) * CHUNK
    chunks = _ceil(slots, chunk)
    count_EC = torch.empty(experts * chunks, dtype=torch.int32, device=device)
    total_E = torch.empty(experts, dtype=torch.int32, device=device)
    sizes = (slots, experts, chunk, chunks)
    shared = 4 * experts
    grid = (chunks, 1)
    launch("moe_plan_count", grid, 32, ids_TK, *sizes, count_EC, device=device, shared=shared)
    sums = (_ceil(experts, 8), 1)
    launch("moe_plan_sum", sums, 256, count_EC, experts, chunks, total_E, device=device)
    outputs = (row_TK, slot_S, ends_E)
    scatter = (ids_TK, *sizes, count_EC, total_E, *outputs)
    launch("moe_plan_scatter", grid, 32, *scatter, device=device, shared=shared)
    return Plan(row_TK, slot_S, ends_E)


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
    """Keep what fits into the experts, reroute the rest to runners-up: `reference.capacity`.

    Three launches a round (five for many slots), and a round for each runner-up.

    Raises:
        RuntimeInputError: More experts, choices or slots than the kernels take.
        RuntimeUnavailable: The kernels cannot be compiled or loaded.
    """
    tokens, top_k = _check_sizes(expert_ids_TK, experts)
    ids_TK = expert_ids_TK.contiguous()
    device = ids_TK.device
    if by == "position":
        priority_TK = next_priority_TM = None
    else:
        assert priority_TK is not None  # ops checks
        priority_TK = priority_TK.contiguous()
    if isinstance(room, Tensor):
        left_E = room.to(device=device, copy=True)
    else:
        least = min(max(room, 0), MAX_SLOTS)
        left_E = torch.full((experts,), least, dtype=torch.int32, device=device)
    placed = Placed(torch.full_like(ids_TK, -1), torch.full_like(ids_TK, -1))
    _select(plan(ids_TK, experts), left_E, priority_TK, None, placed)
    if next_ids_TM is None or next_ids_TM.numel() == 0:
        return placed
    runners_up = next_ids_TM.shape[1]
    next_ids_TM = next_ids_TM.contiguous()
    claim_priority_TK = None
    if next_priority_TM is not None:
        next_priority_TM = next_priority_TM.contiguous()
        claim_priority_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    used_T = torch.zeros(tokens, dtype=torch.int32, device=device)
    claim_ids_TK, which_TK = torch.empty_like(ids_TK), torch.empty_like(ids_TK)
    for _ in range(runners_up):
        asking = (ids_TK, tokens, top_k, next_ids_TM, next_priority_TM, runners_up)
        state = (placed.expert_ids_TK, used_T)
        claims = (claim_ids_TK, which_TK, claim_priority_TK)
        grid = (_ceil(tokens, 256), 1)
        launch("moe_claim", grid, 256, *asking, *state, *claims, device=device)
        _select(plan(claim_ids_TK, experts), left_E, claim_priority_TK, which_TK, placed)
    return placed


def _select(
    of: Plan, left_E: Tensor, priority_TK: Tensor | None, which_TK: Tensor | None, placed: Placed
) -> None:
    """Place what the experts have room for, and take it off their room."""
    outputs = (placed.expert_ids_TK, placed.runner_up_TK)
    arguments = (of.slot_S, of.ends_E, left_E, priority_TK, which_TK, *outputs)
    shared = 4 * (256 + 2 + 32)
    launch("moe_select", (len(left_E), 1), 512, *arguments, device=left_E.device, shared=shared)


def permute(x_TD: Tensor, plan: Plan) -> Tensor:
    """The token of every row: [S, D]. Rows from `plan.ends_E[-1]` on are not written.

    Each row of x is read once. Any dtype: rows are copied in units of 16 bytes, or in smaller ones
    where a row's length in bytes is no multiple of 16.

    Raises:
        RuntimeInputError: Rows of an odd number of bytes.
        RuntimeUnavailable: The kernels cannot be compiled or loaded.
    """
    tokens, top_k = plan.row_TK.shape
    x_TD = x_TD.contiguous()
    x_SD = torch.empty(tokens * top_k, x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
    if x_SD.numel() == 0:
        return x_SD
    row_bytes = x_TD.shape[1] * x_TD.element_size()
    unit = next((u for u in (16, 8, 4, 2) if _aligned(u, row_bytes, x_TD, x_SD)), None)
    if unit is None:
        raise RuntimeInputError(f"rows of {row_bytes} bytes ({x_TD.dtype}) cannot be permuted")
    units = row_bytes // unit
    grid, threads = _rows(tokens, units)
    arguments = (x_TD, plan.row_TK, top_k, units, x_SD)
    launch(f"moe_permute_{unit}", grid, threads, *arguments, device=x_TD.device)
    return x_SD


def swiglu(gate_up_S2F: Tensor, ends_E: Tensor | None = None) -> Tensor:
    """silu(gate) * up, gate being the first half: [S, F]. In float32, rounded once.

    Args:
        gate_up_S2F: float32, bfloat16 or float16.
        ends_E: With it, rows from `ends_E[-1]` on are neither read nor written.

    Raises:
        RuntimeInputError: Another dtype.
        RuntimeUnavailable: The kernels cannot be compiled or loaded.
    """
    width = _width(gate_up_S2F, "gate_up")
    gate_up_S2F = gate_up_S2F.contiguous()
    rows, intermediate = gate_up_S2F.shape[0], gate_up_S2F.shape[1] // 2
    device, dtype = gate_up_S2F.device, gate_up_S2F.dtype
    h_SF = torch.empty(rows, intermediate, dtype=dtype, device=device)
    if h_SF.numel() == 0:
        return h_SF
    if not _aligned(16, intermediate * h_SF.element_size(), gate_up_S2F, h_SF):
        width = 1
    words = intermediate // width
    grid, threads = _rows(rows, words)
    rows_end = None if ends_E is None else ends_E[-1:]
    kernel = f"moe_swiglu_{_name(dtype)}_{width}"
    launch(kernel, grid, threads, gate_up_S2F, rows_end, words, h_SF, device=device)
    return h_SF


def combine(y_SD: Tensor, plan: Plan, weights_TK: Tensor) -> Tensor:
    """Each token's rows times its gate weights, summed in float32 in the order of k: [T, D].

    Rounded once, to the dtype of y. Slots with row -1 add nothing, whatever their weight.

    Args:
        y_SD: float32, bfloat16 or float16; rows that no slot owns are not read.
        plan: Where the rows lie.
        weights_TK: float32, bfloat16 or float16.

    Raises:
        RuntimeInputError: Another dtype.
        RuntimeUnavailable: The kernels cannot be compiled or loaded.
    """
    width = _width(y_SD, "y")
    tokens, top_k = plan.row_TK.shape
    if weights_TK.dtype not in _WEIGHTS:
        raise RuntimeInputError(
            f"weights must be float32, bfloat16 or float16, got {weights_TK.dtype}: convert them"
        )
    y_SD, weights_TK = y_SD.contiguous(), weights_TK.contiguous()
    y_TD = torch.empty(tokens, y_SD.shape[1], dtype=y_SD.dtype, device=y_SD.device)
    if y_TD.numel() == 0:
        return y_TD
    if not _aligned(16, y_SD.shape[1] * y_SD.element_size(), y_SD, y_TD):
        width = 1
    words = y_SD.shape[1] // width
    grid, threads = _rows(tokens, words)
    arguments = (y_SD, plan.row_TK, weights_TK, _WEIGHTS[weights_TK.dtype], top_k, words, y_TD)
    kernel = f"moe_combine_{_name(y_SD.dtype)}_{width}"
    launch(kernel, grid, threads, *arguments, device=y_SD.device)
    return y_TD


def flush_l2(device: torch.device) -> None:
    """Push what a device has in its L2 cache out of it, by reading four times as much of zeros.

    Raises:
        RuntimeUnavailable: The kernels cannot be compiled or loaded, or the first flush of a device
            is inside the capture of a graph, whose memory its buffer must not be part of.
    """
    device = torch.device(device)
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    if device not in _flushed:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeUnavailable(f"flush the L2 of {device} once before a graph captures it")
        cache = int(torch.cuda.get_device_properties(device).L2_cache_size) or 64 << 20
        _flushed[device] = torch.zeros(4 * cache // 16 * 16, dtype=torch.uint8, device=device)
    buffer = _flushed[device]
    words = np.int64(buffer.numel() // 16)
    blocks = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    launch("moe_flush_l2", (blocks, 1), 256, buffer, words, device=device)


def _check_sizes(expert_ids_TK: Tensor, experts: int) -> tuple[int, int]:
    """T and K, if the kernels take that many."""
    tokens, top_k = expert_ids_TK.shape
    if experts > MAX_EXPERTS:
        raise RuntimeInputError(
            f"the CUDA kernels take {MAX_EXPERTS} experts at most, got {experts}: force the "
            'backend "reference"'
        )
    if top_k > MAX_TOP_K:
        raise RuntimeInputError(
            f"the CUDA kernels take {MAX_TOP_K} choices a token at most, got {top_k}: force the "
            'backend "reference"'
        )
    if tokens * top_k > MAX_SLOTS:
        raise RuntimeInputError(
            f"the CUDA kernels take {MAX_SLOTS:,} slots, got {tokens * top_k:,}: split the batch"
        )
    return tokens, top_k


def _width(rows: Tensor, name: str) -> int:
    if rows.dtype not in _WIDTHS:
        raise RuntimeInputError(
            f"the CUDA kernels compute in float32, bfloat16 and float16, and {name} is "
            f'{rows.dtype}: convert it, or force the backend "reference"'
        )
    return _WIDTHS[rows.dtype]


def _aligned(unit: int, row_bytes: int, *tensors: Tensor) -> bool:
    """Whether every row of the tensors begins at a multiple of `unit` bytes."""
    return row_bytes % unit == 0 and all(tensor.data_ptr() % unit == 0 for tensor in tensors)


def _rows(rows: int, words: int) -> tuple[tuple[int, int], int]:
    """Grid and threads for one word of a row a thread."""
    threads = min(256, _ceil(words, 32) * 32)
    return (rows, min(_ceil(words, threads), 65535)), threads


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ceil(count: int, of: int) -> int:
    return -(-count // of)
