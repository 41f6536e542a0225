"""Sums over the tokens of a forward, by layer, tag and expert, on the tokens' own device.

Tokens are counted in 2 G groups: those of valid tokens by tag, then those of padding by tag.

Legend: L layers, T tokens, K choices per token, E experts, G tags.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_lens_hooks.batch import Batch


class Tally:
    """Sums over tokens by layer, (valid or padding, tag) and expert.

    Args:
        batch: The tokens: their tags and padding.
        experts: E, zero experts included.
    """

    def __init__(self, batch: Batch, experts: int) -> None:
        self.batch = batch
        self.experts = experts
        self.groups = len(batch.tags) * (2 if batch.padded else 1)

    def choices(
        self, ids_LTK: Tensor, mask_LTK: Tensor | None = None, weights_LTK: Tensor | None = None
    ) -> Tensor:
        """`[L, groups, E]`: choices, or their weights, where the mask is set."""
        index = ids_LTK
        if self.batch.group_T is not None:
            index = index + (self.batch.group_T * self.experts).unsqueeze(-1)
        values = None
        if weights_LTK is not None:
            values = weights_LTK.float() if mask_LTK is None else weights_LTK.float() * mask_LTK
        elif mask_LTK is not None:
            values = mask_LTK.double()
        flat = _sums(index, values, self.groups * self.experts)
        if weights_LTK is None:
            flat = flat.long()
        return flat.view(len(ids_LTK), self.groups, self.experts)

    def tokens(self, values_LT: Tensor) -> Tensor:
        """`[L, groups]` or `[L, groups, ...]`: the sum of a value over the tokens of each group."""
        if self.batch.group_T is None:
            return values_LT.sum(1, keepdim=True)
        out = values_LT.new_zeros((len(values_LT), self.groups, *values_LT.shape[2:]))
        return out.index_add_(1, self.batch.group_T, values_LT)

    def weighted(self, values_LTE: Tensor, scale_LT: Tensor) -> Tensor:
        """`[L, groups, E]`: the sum over the tokens of each group of a row times its scale."""
        if self.batch.group_T is None:
            return torch.bmm(scale_LT.unsqueeze(1), values_LTE)
        return self.tokens(values_LTE * scale_LT.unsqueeze(-1))

    def valid(self, x: Tensor) -> Tensor:
        return x[:, : len(self.batch.tags)]

    def padding(self, x: Tensor) -> Tensor:
        return x[:, len(self.batch.tags) :]


def _sums(index_LTK: Tensor, values_LTK: Tensor | None, cells: int) -> Tensor:
    """`[L, cells]`: how often each index stands in a layer, or the sum of its values."""
    if index_LTK.device.type == "cpu":
        # Layer by layer: one pass over all of them would first have to tell their indices apart.
        indices = index_LTK.numpy().reshape(len(index_LTK), -1)
        if values_LTK is None:
            return torch.from_numpy(np.stack([np.bincount(i, minlength=cells) for i in indices]))
        pairs = zip(indices, values_LTK.numpy().reshape(len(index_LTK), -1), strict=True)
        return torch.from_numpy(np.stack([np.bincount(i, v, minlength=cells) for i, v in pairs]))
    # bincount reads the largest index on the host, which would make the model wait
    layers = len(index_LTK)
    first_L = torch.arange(layers, device=index_LTK.device) * cells
    flat = (index_LTK + first_L[:, None, None]).flatten()
    ones = torch.ones_like(flat) if values_LTK is None else values_LTK.flatten()
    return ones.new_zeros(layers * cells).index_add_(0, flat, ones).view(layers, cells)
