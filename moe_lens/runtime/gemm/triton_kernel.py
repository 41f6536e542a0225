"""Our own grouped matrix product in Triton: gathers as it loads, gates before it stores.

A program makes one tile of the output. Which expert it belongs to follows from `ends_E` on the
device: tiles of an expert are as many as its rows need, counted up over the experts. The grid is
the most that S rows in E groups can need, and programs behind the last tile leave at once, so the
host never reads a count and the launch can be captured in a CUDA graph.

E experts, D in (the sum runs over it), F out, S rows sorted by expert, T tokens.
Indirect loads of A as in vLLM's fused_moe and in ScatterMoE (arXiv 2403.08245).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_lens.runtime.gemm.tiles import Tile, tile_bound


# Not specialised: else each batch size of another divisibility would compile anew.
@triton.jit(do_not_specialize=["row_tiles", "experts"])  # type: ignore[untyped-decorator,unused-ignore]
def grouped_gemm(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    y_ptr,
    slot_ptr,
    ends_ptr,
    row_tiles,
    experts,
    columns,
    depth,
    x_stride,
    w_stride,
    GATHER_TOP_K: tl.constexpr,
    SWIGLU: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of `y = x @ w.T` for the expert that its rows belong to.

    `row_tiles` is how many tiles along the rows the grid has room for; `columns` is F (with SWIGLU
    w has 2F rows, gate before up, and y has F columns); `depth` is D and the row stride of w;
    `w_stride` leads from one expert's weights to the next. GATHER_TOP_K is K if x holds tokens,
    and a row reads token slot // K; 0 if x holds rows.
    """
    # Neighbouring programs share weights: GROUP_M tiles of rows, then the next columns.
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    per_group = GROUP_M * column_tiles
    first_m = program // per_group * GROUP_M
    group_m = tl.minimum(row_tiles - first_m, GROUP_M)
    tile_m = first_m + program % per_group % group_m
    tile_n = program % per_group // group_m

    expert_E = tl.arange(0, EXPERTS_POW2)
    end_E = tl.load(ends_ptr + expert_E, mask=expert_E < experts, other=0)
    begin_E = tl.load(ends_ptr + expert_E - 1, mask=(expert_E > 0) & (expert_E < experts), other=0)
    tiles_E = tl.where(expert_E < experts, (end_E - begin_E + BLOCK_M - 1) // BLOCK_M, 0)
    last_E = tl.cumsum(tiles_E, 0)
    if tile_m >= tl.sum(tiles_E):
        return
    expert = tl.sum((last_E <= tile_m).to(tl.int32))
    mine_E = expert_E == expert
    begin = tl.sum(tl.where(mine_E, begin_E, 0))
    end = tl.sum(tl.where(mine_E, end_E, 0))
    before = tl.sum(tl.where(mine_E, last_E - tiles_E, 0))

    row_M = begin + (tile_m - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = row_M < end
    source_M = row_M
    if GATHER_TOP_K > 0:
        source_M = tl.load(slot_ptr + row_M, mask=inside_M, other=0) // GATHER_TOP_K
    column_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < columns
    k_K = tl.arange(0, BLOCK_K)
    x_MK = x_ptr + source_M.to(tl.int64)[:, None] * x_stride + k_K[None, :]
    # 64 bits: the weights of a layer can be more than 2**31 numbers.
    w_KN = w_ptr + expert.to(tl.int64) * w_stride + column_N[None, :] * depth + k_K[:, None]
    up_KN = w_KN + columns * depth

    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(tl.cdiv(depth, BLOCK_K)):
        if EVEN_DEPTH:
            x = tl.load(x_MK, mask=inside_M[:, None], other=0.0)
            w = tl.load(w_KN, mask=inside_N[None, :], other=0.0)
        else:
            left_K = k_K < depth - k * BLOCK_K
            x = tl.load(x_MK, mask=inside_M[:, None] & left_K[None, :], other=0.0)
            w = tl.load(w_KN, mask=inside_N[None, :] & left_K[:, None], other=0.0)
        # "ieee": float32 stays float32 (no TF32); it says nothing about bfloat16 and float16.
        sum_MN = tl.dot(x, w, sum_MN, input_precision="ieee")
        if SWIGLU:
            if EVEN_DEPTH:
                up = tl.load(up_KN, mask=inside_N[None, :], other=0.0)
            else:
                left_K = k_K < depth - k * BLOCK_K
                up = tl.load(up_KN, mask=inside_N[None, :] & left_K[:, None], other=0.0)
            up_MN = tl.dot(x, up, up_MN, input_precision="ieee")
            up_KN += BLOCK_K
        x_MK += BLOCK_K
        w_KN += BLOCK_K
    if SWIGLU:
        sum_MN = sum_MN / (1.0 + tl.exp(-sum_MN)) * up_MN
    y_MN = y_ptr + row_M.to(tl.int64)[:, None] * columns + column_N[None, :]
    tl.store(y_MN, sum_MN.to(y_ptr.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])


def arguments(
    experts: int, depth: int, tile: Tile, *, top_k: int = 0, swiglu: bool = False
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "GATHER_TOP_K": top_k,
        "SWIGLU": swiglu,
        "EXPERTS_POW2": triton.next_power_of_2(experts),
        "EVEN_DEPTH": depth % tile.depth == 0,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP_M": 8,
    }


def options(tile: Tile) -> dict[str, Any]:
    """How the kernel is compiled. Fusing is said, since triton 3.10 changes what it does unsaid."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def grouped_mm(
    x_SD: Tensor,
    w_EFD: Tensor,
    ends_E: Tensor,
    tile: Tile,
    *,
    slot_S: Tensor | None = None,
    top_k: int = 0,
    swiglu: bool = False,
) -> Tensor:
    """`x @ w.T` of each expert, gathering before and gating after it if asked.

    Args:
        x_SD: Rows sorted by expert, or with `slot_S` the tokens [T, D] that they come from. The
            last dimension is contiguous.
        w_EFD: Contiguous weights, [E, F, D]; with `swiglu` [E, 2F, D], gate before up.
        ends_E: int32, row after the last one of each expert.
        tile: What one program computes.
        slot_S: Slot of each row; row r reads token slot_S[r] // top_k.
        top_k: K, with `slot_S`.
        swiglu: Store silu(gate) * up.

    Returns:
        [S, F]. Rows from `ends_E[-1]` on are not written.
    """
    experts, columns, depth = w_EFD.shape
    columns = columns // 2 if swiglu else columns
    rows = len(x_SD) if slot_S is None else len(slot_S)
    y_SF = x_SD.new_empty(rows, columns)
    row_tiles = tile_bound(rows, experts, tile.rows)
    grid = (row_tiles * -(-columns // tile.columns),)
    if not rows:
        return y_SF
    on_device: Any = torch.cuda.device(x_SD.device) if x_SD.is_cuda else contextlib.nullcontext()
    with on_device:
        grouped_gemm[grid](
            x_SD,
            w_EFD,
            y_SF,
            ends_E if slot_S is None else slot_S,
            ends_E,
            row_tiles,
            experts,
            columns,
            depth,
            x_SD.stride(0),
            w_EFD.stride(0),
            **options(tile),
            **arguments(experts, depth, tile, top_k=top_k, swiglu=swiglu),
        )
    return y_SF
