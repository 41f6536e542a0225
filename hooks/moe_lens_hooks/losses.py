"""Losses that the user hands over after a forward, laid onto its tokens.

Legend: B sequences, S positions, T = B S tokens, G tags, N tokens whose rows are kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_lens.trace.events import Losses
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.staging import HostCopy


class StagedLosses:
    """Losses on their way to the host.

    Args:
        loss: `[B, S]` or `[B, S - 1]` (of the prediction made at each position), `[T]`, or `[B]`
            (the mean over a sequence's valid tokens). NaN: no loss there (masked labels).
        batch: The forward's tokens.
        layout: How the model flattens.

    Raises:
        ValueError: The shape fits none of these.
    """

    def __init__(self, loss: Tensor, batch: Batch, layout: str) -> None:
        B, S = batch.shape
        loss = loss.detach().to(torch.float32, copy=True)  # the caller may change it in place
        self._batch, self._layout = batch, layout
        self._per_sequence = loss.ndim == 1 and len(loss) == B and (S != 1 or batch.size != B)
        if loss.ndim == 2 and tuple(loss.shape) == (B, S - 1):
            loss = torch.nn.functional.pad(loss, (0, 1), value=float("nan"))
        if not self._per_sequence:
            if loss.ndim == 2 and tuple(loss.shape) == (B, S):
                loss = (loss if layout == "bs" else loss.T).reshape(-1)
            if tuple(loss.shape) != (batch.size,):
                raise ValueError(
                    f"rec.loss got shape {list(loss.shape)}, but the last forward was a batch of "
                    f"{B} x {S} tokens. Give losses per token [{B}, {S}] or [{B}, {S - 1}] (NaN "
                    f"where there is none), or one mean per sequence [{B}]."
                )
        kept = (batch.padding_T, batch.rows_N, batch.position_N)
        self._rows = batch.rows_N is not None
        parts = [loss, *(t for t in kept if t is not None)]
        self._copy = HostCopy(parts)

    def resolve(self) -> Losses:
        batch = self._batch
        loss, *rest = self._copy.arrays()
        valid_T = np.ones(batch.size, bool)
        if batch.padding_T is not None:
            valid_T = ~rest.pop(0)
        rows_N, position_N = rest if self._rows else [np.zeros(0, np.int64)] * 2
        loss_T = loss[self._owner_T()] if self._per_sequence else loss
        here_T = valid_T & np.isfinite(loss_T)
        G = len(batch.tags)
        sums = np.bincount(batch.tag_T[here_T], loss_T[here_T], minlength=G).astype(np.float64)
        counts = np.bincount(batch.tag_T[here_T], minlength=G)
        here_N = here_T[rows_N]
        rows_N, position_N = rows_N[here_N], position_N[here_N].astype(np.int32)
        sequence_N, loss_N = batch.sequence_T[rows_N], loss_T[rows_N]
        if self._per_sequence:
            sequence_N, at = np.unique(sequence_N, return_index=True)
            loss_N = loss_N[at]
        return Losses(
            tags=batch.tags,
            loss_sum_G=sums,
            loss_tokens_G=counts.astype(np.int64),
            sequence_N=sequence_N,
            position_N=None if self._per_sequence else position_N,
            loss_N=loss_N.astype(np.float32),
        )

    def _owner_T(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        B, S = self._batch.shape
        owner_BS = np.repeat(np.arange(B), S).reshape(B, S)
        return (owner_BS if self._layout == "bs" else owner_BS.T).reshape(-1)
