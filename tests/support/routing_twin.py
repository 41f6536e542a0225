"""The routing ops as slow loops, to compare the quick ones with. T tokens, K top-k, E experts,
S = T * K slots, M runners-up; slot s is choice s % K of token s // K."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


def plan_twin(ids_TK: NDArray[Any], experts: int) -> tuple[Ints, Ints, Ints]:
    """(row_TK, slot_S, ends_E) of slots sorted by (expert, slot)."""
    ids_S = [int(expert) for expert in np.asarray(ids_TK).reshape(-1)]
    rows: list[int] = []
    ends: list[int] = []
    for expert in range(experts):
        rows += [slot for slot, chosen in enumerate(ids_S) if chosen == expert]
        ends.append(len(rows))
    row_of = {slot: row for row, slot in enumerate(rows)}
    row_S = [row_of.get(slot, -1) for slot in range(len(ids_S))]
    slot_S = rows + [-1] * (len(ids_S) - len(rows))
    return (
        np.array(row_S, np.int32).reshape(np.shape(ids_TK)),
        np.array(slot_S, np.int32),
        np.array(ends, np.int32),
    )


def capacity_twin(
    ids_TK: NDArray[Any],
    experts: int,
    room: int | NDArray[Any],
    *,
    by: str = "position",
    priority_TK: NDArray[Any] | None = None,
    next_ids_TM: NDArray[Any] | None = None,
    next_priority_TM: NDArray[Any] | None = None,
) -> tuple[Ints, Ints]:
    """(expert_ids_TK, runner_up_TK) that a capacity leaves."""
    ids_TK = np.asarray(ids_TK)
    tokens, top_k = ids_TK.shape
    left = [int(room)] * experts if np.ndim(room) == 0 else [int(r) for r in np.asarray(room)]
    placed_TK = np.full((tokens, top_k), -1, np.int32)
    runner_TK = np.full((tokens, top_k), -1, np.int32)

    def settle(claims: list[tuple[int, int, int, float, int]]) -> None:
        """Claims in slot order: (token, choice, expert, priority, runner-up or -1)."""
        for expert in range(experts):
            mine = [claim for claim in claims if claim[2] == expert]
            if by == "prob":
                mine.sort(key=lambda claim: -claim[3])  # stable: ties stay in slot order
            for t, k, _, _, which in mine:
                if left[expert] > 0:
                    left[expert] -= 1
                    placed_TK[t, k] = expert
                    runner_TK[t, k] = which

    def priority(of: NDArray[Any] | None, t: int, at: int) -> float:
        return 0.0 if by == "position" or of is None else float(of[t, at])

    settle(
        [
            (t, k, int(ids_TK[t, k]), priority(priority_TK, t, k), -1)
            for t in range(tokens)
            for k in range(top_k)
            if ids_TK[t, k] >= 0
        ]
    )
    if next_ids_TM is None:
        return placed_TK, runner_TK
    candidates = next_ids_TM.shape[1]
    unused = [list(range(candidates)) for _ in range(tokens)]
    for _ in range(candidates):
        claims = []
        for t in range(tokens):
            for k in range(top_k):
                if ids_TK[t, k] < 0 or placed_TK[t, k] >= 0 or not unused[t]:
                    continue
                which = unused[t].pop(0)
                if next_ids_TM[t, which] >= 0:
                    expert = int(next_ids_TM[t, which])
                    claims.append((t, k, expert, priority(next_priority_TM, t, which), which))
        settle(claims)
    return placed_TK, runner_TK
