"""What arrives at each rank, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.replay.ep.workload import workloads
from moe_lens.replay.placement.plan import slots_of


@st.composite
def spread_out(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Slots of choices and their weights, ranks, slots of a rank."""
    ranks, per = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    tokens, top_k = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    g = np.random.default_rng(seed)
    slots = ranks * per
    # A token has a slot once at the most; some choices run nowhere.
    slot_TK = np.full((tokens, top_k), -1, np.int32)
    for t in range(tokens):
        some = g.permutation(slots)[:top_k]
        slot_TK[t, : len(some)] = some
    slot_TK[g.random(slot_TK.shape) < 0.3] = -1
    return slot_TK, g.random(slot_TK.shape, dtype=np.float32), ranks, per


@given(spread_out(), st.booleans())
def test_all_ranks_together_are_the_forward(case: Any, dedup: bool) -> None:
    slot_TK, weights_TK, ranks, per = case
    parts = workloads(slot_TK, weights_TK, ranks, per, dedup=dedup)
    seen = []
    for rank, part in enumerate(parts):
        assert part.slots_NJ.shape == part.choice_NJ.shape == part.weights_NJ.shape
        assert part.slots_NJ.shape[1] == (min(slot_TK.shape[1], per) if dedup else 1)
        for row, token in enumerate(part.token_N.tolist()):
            assert (part.slots_NJ[row] >= 0).any()  # nothing arrives for nothing
            for slot, choice, weight in zip(
                part.slots_NJ[row], part.choice_NJ[row], part.weights_NJ[row], strict=True
            ):
                assert (slot < 0) == (choice < 0)
                if slot >= 0:
                    seen.append((token, int(choice), rank * per + int(slot)))
                    assert weight == (weights_TK[token, choice] if dedup else 1)
    want = [
        (t, k, int(slot_TK[t, k]))
        for t in range(slot_TK.shape[0])
        for k in range(slot_TK.shape[1])
        if slot_TK[t, k] >= 0
    ]
    assert sorted(seen) == sorted(want)


@given(spread_out(), st.booleans())
def test_counts_are_those_of_a_plain_loop(case: Any, dedup: bool) -> None:
    slot_TK, weights_TK, ranks, per = case
    for rank, part in enumerate(workloads(slot_TK, weights_TK, ranks, per, dedup=dedup)):
        here = [[int(s) for s in row if s // per == rank and s >= 0] for row in slot_TK]
        assert part.rows == sum(map(len, here))
        arrivals = [t for t, row in enumerate(here) for _ in row[: 1 if dedup else None]]
        assert part.token_N.tolist() == arrivals
        assert part.touched == len({s for row in here for s in row})


def test_replicas_share_a_forward_in_turn() -> None:
    ids_TK = np.array([[0], [0], [0], [1], [0]], np.int32)
    slot_TK = slots_of(ids_TK, np.array([0, 1, 0, 1], np.int32), 2)
    first, second = workloads(slot_TK, np.ones((5, 1), np.float32), 2, 2, dedup=True)
    assert first.token_N.tolist() == [0, 2, 3]
    assert second.token_N.tolist() == [1, 4]
    assert first.slots_NJ.tolist() == [[0], [0], [1]]
    assert second.key == second.key != first.key
