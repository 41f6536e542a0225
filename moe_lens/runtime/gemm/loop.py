"""Grouped matrix product as a loop of `torch.mm` over the experts that have rows.

The host reads the counts: quick on a CPU; on a CUDA device it waits for the device, so this is no
backend for a graph there, only one to compare with.

E experts, D in, F out, S rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_mm(x_SD: Tensor, w_EFD: Tensor | Sequence[Tensor], ends_E: Tensor) -> Tensor:
    """`x @ w.T` of each expert: [S, F]. Rows from `ends_E[-1]` on are neither read nor written.

    Args:
        x_SD: Rows.
        w_EFD: Weights, or their E matrices [F, D] (splitting them takes time that a layer saves).
        ends_E: Row after the last one of each expert.
    """
    matrices = w_EFD.unbind(0) if isinstance(w_EFD, Tensor) else w_EFD
    ends = ends_E.tolist()
    y_SF = x_SD.new_empty(len(x_SD), matrices[0].shape[0])
    if not ends[-1]:
        return y_SF
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    # One call for all views of each side: a slice costs as much as launching a small product.
    rest = [len(x_SD) - ends[-1]]
    inputs = torch.split_with_sizes(x_SD, counts + rest)
    outputs = torch.split_with_sizes(y_SF, counts + rest)
    for count, x, w, y in zip(counts, inputs, matrices, outputs, strict=False):
        if count:
            torch.mm(x, w.t(), out=y)
    return y_SF
