"""Grouped matrix products, each expert's rows times its own weights: torch's, Triton's, a loop.

E experts, D in, F out, S rows sorted by expert.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime.gemm import choice, grouped, loop, tiles

NAMES = ("grouped_mm", "triton", "loop")


@functools.cache
def has_triton() -> bool:
    """Whether the Triton kernel can be had."""
    return find_spec("triton") is not None


def grouped_mm(x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor, backend: str | None = None) -> Tensor:
    """`x @ w.T` of each expert: [S, F]. Rows from `ends_E[-1]` on may hold anything.

    Args:
        x_SD: Rows sorted by expert.
        w_EFD: Weights.
        ends_E: int32, row after the last one of each expert.
        backend: One of `NAMES`; without it, "loop" on a CPU and `choice.choose` on a CUDA device.

    Raises:
        RuntimeInputError: No such backend, or not on this device.
    """
    experts, out, depth = w_EFD.shape
    if backend is None:
        backend = "loop"
        if x_SD.is_cuda:
            capability = torch.cuda.get_device_capability(x_SD.device)
            backend = choice.choose(
                capability,
                x_SD.dtype,
                len(x_SD),
                experts,
                depth,
                out,
                has_triton=has_triton(),
                aligned=grouped.is_aligned(x_SD, w_EFD),
            ).name
    if backend == "loop":
        return loop.grouped_mm(x_SD, w_EFD, ends_E)
    if backend == "grouped_mm":
        return grouped.grouped_mm(x_SD, w_EFD, ends_E)
    if backend == "triton":
        from moe_lens.runtime.gemm import triton_kernel

        block = tiles.block_rows([-(-len(x_SD) // experts)] * experts)
        tile = tiles.tile_for(block, x_SD.dtype, swiglu=False)
        # The kernel steps through rows whose numbers stand side by side.
        return triton_kernel.grouped_mm(x_SD.contiguous(), w_EFD.contiguous(), ends_E, tile)
    raise RuntimeInputError(f"no grouped matrix product {backend!r}: there are {', '.join(NAMES)}")
