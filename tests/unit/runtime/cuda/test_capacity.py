"""capacity, as the kernels compute it: equal to a naive loop that keeps lists and sorts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routing_twin import capacity_twin
from support.routings import Routing, routing, routings

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime.cuda import kernels

pytestmark = pytest.mark.usefixtures("lanes")


def assert_capacity(of: Routing, room: int | torch.Tensor, by: str, reroute: bool) -> None:
    options = {"by": by}
    if by == "prob":
        options["priority_TK"] = of.priority_TK
    if reroute:
        options["next_ids_TM"] = of.next_ids_TM
        options["next_priority_TM"] = of.next_priority_TM
    got = kernels.capacity(of.ids_TK, of.experts, room, **options)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = capacity_twin(of.ids_TK.numpy(), of.experts, room, **arrays)
    np.testing.assert_array_equal(got.expert_ids_TK, expected[0])
    np.testing.assert_array_equal(got.runner_up_TK, expected[1])
    # No expert holds more than it has room for, and nothing runs that was not asked for.
    held_E = np.bincount(got.expert_ids_TK[got.expert_ids_TK >= 0], minlength=of.experts)
    assert (held_E <= np.maximum(np.asarray(room), 0)).all()
    assert not ((got.expert_ids_TK >= 0) & (of.ids_TK < 0)).any()


@settings(max_examples=120, deadline=None)
@given(
    routings(),
    st.integers(0, 20) | st.none(),
    st.sampled_from(["position", "prob"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_the_twin(of: Routing, room: int | None, by: str, reroute: bool, seed: int):
    if room is None:
        random = np.random.default_rng(seed)
        room = torch.from_numpy(random.integers(-1, 12, of.experts).astype(np.int32))
        before = room.clone()
        assert_capacity(of, room, by, reroute)
        assert torch.equal(room, before)  # the caller's own
    else:
        assert_capacity(of, room, by, reroute)


@pytest.mark.parametrize("by", ["position", "prob"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "room", "skew", "levels"),
    [
        (1500, 1, 1, 700, 0.0, 0),  # more slots than the block has threads
        (1500, 1, 1, 700, 0.0, 1),  # most of them tie
        (1500, 4, 2, 600, 1.0, 2),
        (700, 128, 8, 30, 0.5, 0),
        (40, 1024, 8, 1, 0.2, 3),
        (40, 64, 8, 10**12, 0.0, 0),  # room without end
    ],
)
def test_sizes(by, tokens, experts, top_k, room, skew, levels):
    runners_up = min(3, experts - top_k)
    of = routing(1, tokens, experts, top_k, runners_up=runners_up, skew=skew, levels=levels)
    assert_capacity(of, room, by, reroute=True)


def test_probability_orders_every_kind_of_float():
    kinds = [-0.0, 0.0, 1e-45, -1e-45, 1.0, -1.0, torch.inf, -torch.inf, 0.1, 0.1, 3e38, -3e38]
    for room in range(len(kinds) + 1):
        of = routing(0, len(kinds), 1, 1, none=0.0)
        of.priority_TK = torch.tensor(kinds)[:, None]
        assert_capacity(of, room, "prob", reroute=False)


def test_unbounded_room_changes_nothing():
    of = routing(3, 50, 16, 4, runners_up=2)
    placed = kernels.capacity(of.ids_TK, 16, 50, next_ids_TM=of.next_ids_TM)
    assert torch.equal(placed.expert_ids_TK, of.ids_TK)
    assert (placed.runner_up_TK == -1).all()


def test_more_than_the_kernels_take_is_refused():
    ids_TK = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(RuntimeInputError, match="2048 experts at most, got 2049"):
        kernels.capacity(ids_TK, 2049, 1)
