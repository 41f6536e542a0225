"""Losses that the user hands over after a forward, laid onto its tokens.

Legend: B sequences, S positions, T = B S tokens, G tags, N tokens whose rows are kept.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.errors import CaptureBreach
from moe_lens.trace.events import Losses
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.forward import OpenForward
from moe_lens_hooks.staging import HostCopy


def losses_of(last: OpenForward | None, loss: Tensor, layout: str) -> StagedLosses:
    """The losses of a forward, its decoder's if it has several streams; see `StagedLosses`.

    Args:
        last: The forward that was recorded last.
        loss: As `StagedLosses` takes them.
        layout: How the model flattens.

    Raises:
        ValueError: The shape fits none of its batch.
        CaptureBreach: There is none, or it routed nothing.
    """
    if last is None:
        raise CaptureBreach("rec.loss before any recorded forward: call it after the model ran")
    stream = "decoder" if "decoder" in last.batches else next(iter(last.batches), None)
    if stream is None:
        raise CaptureBreach("rec.loss: the last forward routed nothing that could be recorded")
    return StagedLosses(loss, last.batches[stream], layout, last.step, last.forward)


class StagedLosses:
    """Losses on their way to the host.

    Args:
        loss: `[B, S]` or `[B, S - 1]` (of the prediction made at each position), `[T]`, or `[B]`
            (the mean over a sequence's valid tokens). NaN: no loss there (masked labels).
        batch: The forward's tokens.
        layout: How the model flattens.
        step, forward: Which forward.

    Raises:
        ValueError: The shape fits none of these.
    """

    def __init__(self, loss: Tensor, batch: Batch, layout: str, step: int, forward: int) -> None:
        B, S = batch.shape
        loss = loss.detach().to(torch.float32, copy=True)  # the caller may change it in place
        self._batch, self._layout = batch, layout
        self._step, self._forward = step, forward
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
        self._copy = HostCopy([loss, *batch.tensors()])

    def resolve(self) -> Losses:
        landed = iter(self._copy.arrays())
        loss = next(landed)
        batch = self._batch.land(landed)
        loss_T = loss[self._row_T()] if self._per_sequence else loss
        here_T = np.isfinite(loss_T)
        if batch.padding_T is not None:
            here_T &= ~batch.padding_T
        G = len(self._batch.tags)
        sums = np.bincount(batch.tag_T[here_T], loss_T[here_T], minlength=G).astype(np.float64)
        counts = np.bincount(batch.tag_T[here_T], minlength=G)
        token_N, position_N = batch.token_N, batch.position_N
        if token_N is None or position_N is None:
            token_N = position_N = np.zeros(0, np.int64)
        here_N = here_T[token_N]
        token_N, position_N = token_N[here_N], position_N[here_N].astype(np.int32)
        sequence_N, loss_N = batch.sequence_T[token_N], loss_T[token_N]
        if self._per_sequence:
            sequence_N, at = np.unique(sequence_N, return_index=True)
            loss_N = loss_N[at]
        return Losses(
            step=self._step,
            forward=self._forward,
            tags=self._batch.tags,
            loss_sum_G=sums,
            loss_tokens_G=counts.astype(np.int64),
            sequence_N=sequence_N,
            position_N=None if self._per_sequence else position_N,
            loss_N=loss_N.astype(np.float32),
        )

    def _row_T(self) -> NDArray[np.int64]:
        B, S = self._batch.shape
        row_BS = np.repeat(np.arange(B), S).reshape(B, S)
        return (row_BS if self._layout == "bs" else row_BS.T).reshape(-1)
