"""`plan`, `capacity` and the check of ids, against loops over the slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.routing_twin import capacity_twin, plan_twin

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime import ops
from moe_lens.runtime.checks import check_ids

PATHS = pytest.mark.parametrize("reference", [True, False], ids=["reference", "cpu"])


@st.composite
def routings(draw):
    """(ids int32 [T, K], E): what routers give, with slots that no expert runs for."""
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(experts, 4)))
    tokens = draw(st.integers(0, 12))
    some = draw(st.sampled_from([experts, max(top_k, experts // 3)]))  # skewed: few of the experts
    rows = [draw(st.permutations(range(some)))[:top_k] for _ in range(tokens)]
    rows = [[-1 if draw(st.integers(0, 5)) == 0 else e for e in row] for row in rows]
    return torch.tensor(rows, dtype=torch.int32).reshape(tokens, top_k), experts


@st.composite
def overflows(draw):
    """The arguments of `capacity`: ids, E, room, and priorities and runners-up or None."""
    ids, experts = draw(routings())
    tokens, top_k = ids.shape
    each = st.lists(st.integers(0, 4), min_size=experts, max_size=experts)
    room = draw(st.integers(0, 4) | each.map(lambda r: torch.tensor(r, dtype=torch.int32)))

    def levels(columns):
        # Few of them, so that there are ties.
        rows = [[draw(st.integers(0, 3)) for _ in range(columns)] for _ in range(tokens)]
        return torch.tensor(rows, dtype=torch.float32).reshape(tokens, columns)

    by = draw(st.sampled_from(["position", "prob"]))
    more = {"by": by, "priority_TK": levels(top_k) if by == "prob" else None}
    if draw(st.booleans()):
        runners_up = draw(st.integers(0, 3))
        rows = []
        for row in ids.tolist():
            others = [e for e in draw(st.permutations(range(experts))) if e not in row]
            others = [-1 if draw(st.integers(0, 7)) == 0 else e for e in others]
            rows.append((others + [-1] * runners_up)[:runners_up])
        more["next_ids_TM"] = torch.tensor(rows, dtype=torch.int32).reshape(tokens, runners_up)
        more["next_priority_TM"] = levels(runners_up) if by == "prob" else None
    return ids, experts, room, more


@PATHS
@given(routings())
def test_plan_is_what_a_loop_finds(reference, routing):
    ids, experts = routing
    plan = ops.plan(ids, experts, reference=reference)
    row_TK, slot_S, ends_E = plan_twin(ids, experts)
    np.testing.assert_array_equal(plan.row_TK, row_TK)
    np.testing.assert_array_equal(plan.slot_S, slot_S)
    np.testing.assert_array_equal(plan.ends_E, ends_E)
    assert {t.dtype for t in (plan.row_TK, plan.slot_S, plan.ends_E)} == {torch.int32}
    assert plan.row_TK.shape == ids.shape


@pytest.mark.parametrize("experts", [255, 256, 257, 65_536])
def test_plan_sorts_ids_of_any_width(experts):
    ids = torch.tensor([[experts - 1], [-1], [0], [experts - 1]], dtype=torch.int32)
    plan = ops.plan(ids, experts)
    assert plan.slot_S.tolist() == [2, 0, 3, -1]
    assert plan.ends_E[[0, experts - 2, experts - 1]].tolist() == [1, 1, 3]


@PATHS
@given(overflows())
def test_capacity_is_what_a_loop_finds(reference, overflow):
    ids, experts, room, more = overflow
    placed = ops.capacity(ids, experts, room, reference=reference, **more)
    ids_TK, runner_up_TK = capacity_twin(ids, experts, room, **more)
    np.testing.assert_array_equal(placed.expert_ids_TK, ids_TK)
    np.testing.assert_array_equal(placed.runner_up_TK, runner_up_TK)
    assert placed.expert_ids_TK.dtype == placed.runner_up_TK.dtype == torch.int32
    assert placed.expert_ids_TK.shape == ids.shape


@given(overflows())
def test_capacity_loses_and_invents_no_slot(overflow):
    ids, experts, room, more = overflow
    placed = ops.capacity(ids, experts, room, **more)
    after, kept = placed.expert_ids_TK, placed.expert_ids_TK >= 0
    rerouted, dropped = placed.runner_up_TK >= 0, (ids >= 0) & ~kept
    assert kept.sum() + dropped.sum() == (ids >= 0).sum()
    assert bool((rerouted <= kept).all())
    assert after[kept & ~rerouted].tolist() == ids[kept & ~rerouted].tolist()
    assert not kept[ids < 0].any()
    full = torch.full((experts,), room) if isinstance(room, int) else room
    assert (torch.bincount(after[kept], minlength=experts) <= full).all()
    check_ids(after, experts)  # no expert twice for a token


@given(routings())
def test_room_for_all_drops_nothing(routing):
    ids, experts = routing
    placed = ops.capacity(ids, experts, ids.numel())
    assert torch.equal(placed.expert_ids_TK, ids)
    assert (placed.runner_up_TK == -1).all()


def test_a_priority_decides_who_stays():
    ids = torch.zeros(3, 1, dtype=torch.int32)
    prob = torch.tensor([[0.2], [0.9], [0.9]])
    first = ops.capacity(ids, 2, 1).expert_ids_TK
    best = ops.capacity(ids, 2, 1, by="prob", priority_TK=prob).expert_ids_TK
    assert first.flatten().tolist() == [0, -1, -1]
    assert best.flatten().tolist() == [-1, 0, -1]


def test_sound_ids_pass():
    check_ids(torch.tensor([[0, 2], [-1, -1]], dtype=torch.int32), 3)
    check_ids(torch.empty(0, 2, dtype=torch.int32), 3)
    runners_up = torch.tensor([[2, -1]], dtype=torch.int32)
    check_ids(torch.tensor([[0, 1]], dtype=torch.int32), 3, runners_up)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[0, 1], [2, 2]], r"token 1 has \[2, 2\]: expert 2 stands there twice"),
        ([[0, 1], [3, 1]], r"token 1 has \[3, 1\], but there are 3 experts"),
        ([[0, -2]], r"token 0 has \[0, -2\]"),
        ([[0, 1, 2, -1]], "4 choices a token"),
        (np.zeros((2, 0)), "0 choices a token"),
        ([0, 1], r"must be \[tokens, choices\], got shape \[2\]"),
    ],
)
def test_bad_ids_are_refused(ids, said):
    with pytest.raises(RuntimeInputError, match=said):
        check_ids(torch.tensor(ids, dtype=torch.int32), 3)


def test_ids_of_another_dtype_are_refused():
    with pytest.raises(RuntimeInputError, match=r"int32, got torch.int64.*\.to\(torch.int32\)"):
        check_ids(torch.zeros(2, 1, dtype=torch.int64), 3)


@pytest.mark.parametrize("runner_up", [[1, 0], [2, 2], [4, -1]])
def test_bad_runners_up_are_refused(runner_up):
    ids, runners_up = torch.tensor([[0]]).int(), torch.tensor([runner_up]).int()
    with pytest.raises(RuntimeInputError, match="next_ids"):
        check_ids(ids, 4, runners_up)


def test_no_experts_are_refused():
    with pytest.raises(RuntimeInputError, match="at least one expert, got 0"):
        check_ids(torch.zeros(2, 1).int(), 0)


@pytest.mark.parametrize("wrong", [-2, 3, 300])
def test_the_cpu_path_refuses_ids_out_of_range(wrong):
    with pytest.raises(RuntimeInputError, match="token 1 has"):
        ops.plan(torch.tensor([[0], [wrong]], dtype=torch.int32), 3)


IDS = torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("room", "more", "said"),
    [
        (1, {"by": "luck"}, "'luck'"),
        (-1, {}, "room is -1"),
        (torch.zeros(2, dtype=torch.int32), {}, r"int32 \[3\], got torch.int32 \[2\]"),
        (torch.zeros(3, dtype=torch.int64), {}, r"got torch.int64"),
        (1, {"by": "prob"}, "needs priority_TK"),
        (1, {"by": "prob", "priority_TK": torch.zeros(2, 2)}, r"must be float32 \[2, 1\]"),
        (1, {"next_ids_TM": torch.zeros(3, 1).int()}, r"next_ids must be \[2, choices\]"),
        (
            1,
            {"by": "prob", "priority_TK": torch.zeros(2, 1), "next_ids_TM": IDS},
            "needs next_priority_TM",
        ),
    ],
)
def test_capacity_refuses_what_does_not_fit(room, more, said):
    with pytest.raises(RuntimeInputError, match=said):
        ops.capacity(IDS, 3, room, **more)
