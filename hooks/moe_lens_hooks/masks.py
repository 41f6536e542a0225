"""Padding, from the attention mask that a model is given.

Legend: B sequences (rows), S positions, H heads, Q queries (the S positions of this forward),
K keys (of the past and of this forward).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASKED = -9e3
"""An additive mask at or below this hides a key; libraries use -10000, the type's minimum or -inf,
and position biases stay far above."""


def padding_from_mask(mask: Any, batch: int, length: int, past: int | None = None) -> Tensor | None:
    """Padding `[B, S]` (True: padding) from an attention mask; None where it does not tell.

    Of `[B, K]`, the last S columns are this forward's. Of `[B, H, Q, K]` (True or 0: attended) a
    token is padding where no head attends from it to itself: a mask of padding hides its column.

    Args:
        mask: What the model was given: a tensor, or a dict of them by kind of layer.
        batch: B.
        length: S.
        past: Keys before this forward's; None: all that there are more than S.
    """
    mask = one_mask(mask)
    if not isinstance(mask, Tensor) or mask.is_meta or mask.ndim < 2:
        return None
    if mask.shape[0] not in (1, batch):
        return None
    if mask.ndim == 2:
        if mask.shape[0] != batch or mask.shape[1] < length:
            return None
        return mask[:, -length:] == 0
    if mask.ndim not in (3, 4) or mask.shape[-2] != length or mask.shape[-1] < length:
        return None
    first = mask.shape[-1] - length if past is None else min(past, mask.shape[-1] - length)
    own = mask.diagonal(offset=first, dim1=-2, dim2=-1)
    attended = own if own.dtype == torch.bool else own > _MASKED
    if mask.ndim == 4:
        attended = attended.any(1)
    return (~attended).expand(batch, length)


def one_mask(mask: Any) -> Any:
    """The mask itself; of a dict by kind of layer, that of full attention or the first."""
    if not isinstance(mask, dict):
        return mask
    kinds = [mask.get("full_attention"), *mask.values()]
    return next((m for m in kinds if isinstance(m, Tensor)), None)


def positions_without(padding_BS: Tensor, mask: Any, past: int) -> Tensor:
    """Positions `[B, S]` counted over valid tokens; a padding token has that of the last before it.

    Args:
        padding_BS: True: padding.
        mask: The model's mask; one of `[B, past + S]` tells the padding of the past too.
        past: Positions in the cache.
    """
    here = (~padding_BS).cumsum(1) - 1
    if not past:
        return here.clamp_min(0)
    whole = past + padding_BS.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == whole:
        return (here + (mask[:, :past] != 0).sum(1, keepdim=True)).clamp_min(0)
    return here + past
