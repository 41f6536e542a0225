"""Grouped matrix product by `torch.nn.functional.grouped_mm`, and where that is quick.

Its fast path is for compute capability 9 and 10 and bfloat16 alone (torch's GroupedBlas.cpp).
Elsewhere it copies the counts to the host and loops, which no CUDA graph can capture.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 16
"""Bytes that row strides, and where a tensor begins, must be a multiple of."""

MAX_EXPERTS = 1023
"""One thread of one block prepares each (GroupMM.cu)."""


def is_fast(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch has a kernel of its own here, without a host in the loop."""
    return capability[0] in (9, 10) and dtype == torch.bfloat16 and exists()


def exists() -> bool:
    """Whether this torch has it (2.10 is the first)."""
    return hasattr(torch.nn.functional, "grouped_mm")


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all of them begin where it can read them; a view of a larger tensor may not."""
    return all(tensor.data_ptr() % ALIGN == 0 for tensor in tensors)


def obstacle(dtype: torch.dtype, experts: int, *widths: int, aligned: bool = True) -> str:
    """What it cannot take of a layer whose rows have these widths; "" if nothing."""
    if experts > MAX_EXPERTS:
        return f"grouped_mm takes at most {MAX_EXPERTS} experts, and there are {experts}"
    if any(width * dtype.itemsize % ALIGN for width in widths):
        rows = " and ".join(map(str, widths))
        return f"grouped_mm needs rows of a multiple of {ALIGN} bytes, and widths are {rows}"
    if not aligned:
        return (
            f"grouped_mm needs tensors that begin at a multiple of {ALIGN} bytes, and one does not"
        )
    return ""


def grouped_mm(x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """`x @ w.T` of each expert: [S, F]. Rows from `ends_E[-1]` on may hold anything."""
    return torch.nn.functional.grouped_mm(x_SD, w_EFD.transpose(1, 2), offs=ends_E)
