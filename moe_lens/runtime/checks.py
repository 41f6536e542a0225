"""What the runtime refuses, and how it says so.

`check_ids` reads values and so makes the host wait for a device: it belongs where a workload is
built. The others look at shapes and dtypes alone, and cost nothing inside a captured graph.

T tokens, K top-k, E experts, M runners-up of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError

MAX_SLOTS = 2**31 - 1
"""Rows and slots are counted in int32."""


def check_ids(expert_ids_TK: Tensor, experts: int, next_ids_TM: Tensor | None = None) -> None:
    """Refuse ids that no router gives: out of range, or one expert twice for a token.

    Args:
        expert_ids_TK: int32 [T, K]; -1: no expert runs for this slot.
        experts: E.
        next_ids_TM: int32 [T, M], the runners-up if there are any. They must differ from each other
            and from the token's own choices; -1: no such runner-up.

    Raises:
        RuntimeInputError: With the first token at fault and its ids.
    """
    check_plan(expert_ids_TK, experts)
    _check_values(expert_ids_TK, experts, "expert_ids")
    if next_ids_TM is None:
        return
    _check_matrix(next_ids_TM, "next_ids", len(expert_ids_TK))
    _check_values(next_ids_TM, experts, "next_ids")
    both = torch.cat([expert_ids_TK, next_ids_TM.to(expert_ids_TK.device)], dim=1)
    _check_values(both, experts, "expert_ids and next_ids together")


def _check_values(ids_TK: Tensor, experts: int, name: str) -> None:
    ids_TK = ids_TK.detach().cpu()
    wrong_T = ((ids_TK < -1) | (ids_TK >= experts)).any(dim=1)
    if wrong_T.any():
        token = int(wrong_T.int().argmax())
        raise RuntimeInputError(
            f"{name}: token {token} has {ids_TK[token].tolist()}, but there are {experts} experts: "
            f"ids go from 0 to {experts - 1}, and -1 stands for none"
        )
    sorted_TK = ids_TK.sort(dim=1).values
    twice_TK = (sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)
    twice_T = twice_TK.any(dim=1)
    if twice_T.any():
        token = int(twice_T.int().argmax())
        expert = int(sorted_TK[token, 1:][twice_TK[token]][0])
        raise RuntimeInputError(
            f"{name}: token {token} has {ids_TK[token].tolist()}: expert {expert} stands there "
            "twice, and a token chooses an expert once"
        )


def _check_matrix(ids_TK: Tensor, name: str, tokens: int | None = None) -> None:
    if ids_TK.dim() != 2 or (tokens is not None and len(ids_TK) != tokens):
        wanted = "[tokens, choices]" if tokens is None else f"[{tokens}, choices]"
        raise RuntimeInputError(f"{name} must be {wanted}, got shape {list(ids_TK.shape)}")
    if ids_TK.dtype != torch.int32:
        raise RuntimeInputError(
            f"{name} must be int32, got {ids_TK.dtype}: convert with .to(torch.int32)"
        )


def check_plan(expert_ids_TK: Tensor, experts: int) -> None:
    """Refuse what `plan` cannot take, by shape and dtype.

    Raises:
        RuntimeInputError: Not int32 [T, K], no expert, K outside 1..E, or too many slots.
    """
    if experts < 1:
        raise RuntimeInputError(f"a layer needs at least one expert, got {experts}")
    _check_matrix(expert_ids_TK, "expert_ids")
    top_k = expert_ids_TK.shape[1]
    if not 1 <= top_k <= experts:
        raise RuntimeInputError(
            f"expert_ids: {top_k} choices a token, but a token of {experts} experts has 1 to "
            f"{experts}"
        )
    if expert_ids_TK.numel() > MAX_SLOTS:
        raise RuntimeInputError(
            f"{expert_ids_TK.numel():,} slots are more than the {MAX_SLOTS:,} that rows are "
            "counted to: split the batch"
        )


def check_capacity(
    expert_ids_TK: Tensor,
    experts: int,
    room: int | Tensor,
    by: str,
    priority_TK: Tensor | None,
    next_ids_TM: Tensor | None,
    next_priority_TM: Tensor | None,
) -> None:
    """Refuse what `capacity` cannot take, by shape and dtype.

    Raises:
        RuntimeInputError: What is wrong with which argument.
    """
    check_plan(expert_ids_TK, experts)
    if by not in ("position", "prob"):
        raise RuntimeInputError(f'by is {by!r}: it is "position" or "prob"')
    if isinstance(room, int):
        if room < 0:
            raise RuntimeInputError(f"room is {room}: an expert takes no slots, or some")
    elif room.shape != (experts,) or room.dtype != torch.int32:
        raise RuntimeInputError(
            f"room must be an int or int32 [{experts}], got {room.dtype} {list(room.shape)}"
        )
    if next_ids_TM is not None:
        _check_matrix(next_ids_TM, "next_ids", len(expert_ids_TK))
    if by == "prob":
        _check_priority(priority_TK, expert_ids_TK, "priority_TK")
        if next_ids_TM is not None:
            _check_priority(next_priority_TM, next_ids_TM, "next_priority_TM")


def _check_priority(priority: Tensor | None, ids: Tensor, name: str) -> None:
    if priority is None:
        raise RuntimeInputError(f'by="prob" needs {name}: what to rank slots by')
    if priority.shape != ids.shape or priority.dtype != torch.float32:
        raise RuntimeInputError(
            f"{name} must be float32 {list(ids.shape)}, got {priority.dtype} {list(priority.shape)}"
        )
