"""Where the tokens of a batch stand in their sequences, with padding, packed rows, a cache.

Legend: B rows, S positions, T = B S tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens_hooks.inputs import batch_shape, packed_lengths
from moe_lens_hooks.masks import padding_from_mask, positions_without


@dataclass
class Placed:
    """The tokens of one forward, in the order in which the model flattens them.

    Attributes:
        run_T: Which of the batch's sequences, numbered in order; -1: padding.
        position_T: Position in it, from 0 and without padding.
        runs: Sequences in the batch.
    """

    run_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    runs: int


def place(
    inputs: dict[str, Any],
    stream: str,
    shape: tuple[int, ...],
    past: int,
    layout: str,
) -> Placed:
    """Sequence and position of each token of a forward.

    A row is a sequence; or several, one after the other, where `position_ids` starts again in it or
    cumulative lengths say so.

    Args:
        inputs: The root module's arguments by name.
        stream: main, encoder, decoder or mtp.
        shape: Of a block's input but the last axis: (B, S), (T,), or () where it sees but a part.
        past: Positions in the cache before this forward.
        layout: "bs", or "sb" as Megatron flattens.
    """
    block = (shape[0], shape[1]) if len(shape) == 2 else None
    B, S = batch_shape(inputs, stream, block, math.prod(shape) if shape else None, layout)
    mask = inputs.get("decoder_attention_mask" if stream == "decoder" else "attention_mask")
    padding = padding_from_mask(mask, B, S, past)
    if padding is None:
        padding = torch.zeros((B, S), dtype=torch.bool, device="cpu")
    valid_BS = ~padding.cpu().numpy()
    position_BS = positions_without(padding, mask, past).cpu().numpy()
    given = inputs.get("position_ids") if stream == "main" else None
    if isinstance(given, Tensor) and tuple(given.shape) in ((B, S), (1, S)):
        position_BS = given.expand(B, S).cpu().numpy().astype(np.int64)
    run_BS = _runs(valid_BS, position_BS)
    lengths = packed_lengths(inputs, stream)
    if lengths is not None:
        ends = torch.as_tensor(lengths, device="cpu").numpy().astype(np.int64)
        run_BS = np.repeat(np.arange(len(ends) - 1), np.diff(ends)).reshape(B, S)
        position_BS = np.arange(B * S).reshape(B, S) - ends[run_BS]
    run_T, position_T = (x if layout == "bs" else x.T for x in (run_BS, position_BS))
    return Placed(run_T.reshape(-1), position_T.reshape(-1), int(run_BS.max(initial=-1)) + 1)


def _runs(valid_BS: NDArray[np.bool_], position_BS: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of each token's sequence: a new one in each row, and where positions fall."""
    row, column = np.nonzero(valid_BS)
    position = position_BS[row, column]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (position[1:] <= position[:-1])
    run_BS = np.full(valid_BS.shape, -1, np.int64)
    run_BS[row, column] = new.cumsum() - 1
    return run_BS
