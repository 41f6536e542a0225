"""Whose each token of a forward is: a row's, or a packed sequence's.

Legend: B sequences (rows), S positions, T = B S tokens, P sequences (B, or how many are packed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens_hooks.lineage import Line

Layout = str
"""How a model flattens: "bs" (token t = b S + s) or "sb" (t = s B + b, as Megatron does)."""


@dataclass
class Owners:
    """The sequences of a forward's tokens.

    Attributes:
        lines: The sequences, P.
        owner_T: Which of them a token is of: on the host, or a tensor where only a device knows.
        position_T: Position in a packed sequence, likewise; None where a row is one sequence.
        row_P: For each sequence, which of the values that the user gives per sequence are its own.
        beyond_T: Tokens behind the last packed sequence, padding; None: there are none.
    """

    lines: list[Line]
    owner_T: NDArray[np.int64] | Tensor
    position_T: NDArray[np.int64] | Tensor | None
    row_P: list[int]
    beyond_T: Tensor | None = None

    @property
    def unit(self) -> str:
        return "sequences" if self.position_T is None else "packed sequences"


def flat(x_BS: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """`[B, S]` in the order of the model's tokens."""
    return (x_BS if layout == "bs" else x_BS.T).reshape(-1)


def owned_by_rows(lines: list[Line], S: int, layout: Layout) -> Owners:
    """Each row is a sequence."""
    B = len(lines)
    row_BS = np.broadcast_to(np.arange(B)[:, None], (B, S))
    return Owners(lines, flat(row_BS, layout), None, list(range(B)))


def owned_by_lengths(lines: list[Line], cumulative: NDArray[np.int64], T: int) -> Owners:
    """One row of packed sequences; what is behind the last one is padding."""
    lengths = np.diff(cumulative)
    tail = T - int(cumulative[-1])
    owner_T = np.repeat(np.arange(len(lengths)), lengths)
    position_T = np.arange(T - tail) - np.repeat(cumulative[:-1], lengths)
    beyond_T = None
    if tail:
        owner_T = np.append(owner_T, np.full(tail, len(lengths) - 1))
        position_T = np.append(position_T, np.zeros(tail, np.int64))
        beyond_T = torch.arange(T) >= T - tail
    return Owners(lines, owner_T, position_T, list(range(len(lengths))), beyond_T)


def owned_on_device(lines: list[Line], cumulative: Tensor, T: int) -> Owners:
    """As `owned_by_lengths`, of lengths that only a device knows: nothing is waited for."""
    token_T = torch.arange(T, device=cumulative.device)
    lengths = cumulative.to(token_T.dtype)
    owner_T = torch.searchsorted(lengths[1:].contiguous(), token_T, right=True)
    beyond_T = token_T >= lengths[-1]
    owner_T = owner_T.clamp_max(len(lines) - 1)
    position_T = torch.where(beyond_T, 0, token_T - lengths[owner_T])
    return Owners(lines, owner_T, position_T, list(range(len(lines))), beyond_T)


def runs(ids_BS: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a run of one id begins in its row."""
    new_BS = np.ones(ids_BS.shape, bool)
    new_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
    return new_BS


def owned_by_runs(lines: list[Line], new_BS: NDArray[np.bool_], layout: Layout) -> Owners:
    """A sequence begins wherever `new_BS` is set."""
    B, S = new_BS.shape
    run_BS = new_BS.reshape(-1).cumsum().reshape(B, S) - 1
    at_BS = np.broadcast_to(np.arange(S)[None], (B, S))
    position_BS = at_BS - np.maximum.accumulate(np.where(new_BS, at_BS, 0), axis=1)
    rows = np.broadcast_to(np.arange(B)[:, None], (B, S))[new_BS]
    return Owners(lines, flat(run_BS, layout), flat(position_BS, layout), rows.tolist())


def restarts(positions: Tensor) -> Tensor:
    """Where `[B, S]` positions do not go on by one: another sequence begins there."""
    return positions.diff(dim=-1) != 1
