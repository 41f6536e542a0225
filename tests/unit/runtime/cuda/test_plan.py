"""plan, as the kernels compute it: equal to a naive loop, for any routing, in any thread order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.cuda_on_cpu import Lanes
from support.routing_twin import plan_twin
from support.routings import Routing, routing, routings

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime.cuda import kernels
from moe_lens.runtime.plan import Plan

pytestmark = pytest.mark.usefixtures("lanes")


def assert_plan(ids_TK: torch.Tensor, experts: int) -> None:
    assert_equal(kernels.plan(ids_TK, experts), plan_twin(ids_TK, experts))


def assert_equal(got: Plan, expected: tuple[np.ndarray, ...]) -> None:
    for array, wanted in zip((got.row_TK, got.slot_S, got.ends_E), expected, strict=True):
        assert array.dtype == torch.int32
        np.testing.assert_array_equal(array.numpy(), wanted)


@settings(max_examples=80, deadline=None)
@given(routings(150))
def test_one_block(of: Routing):
    assert_plan(of.ids_TK, of.experts)


@settings(max_examples=80, deadline=None)
@given(routings(150))
def test_many_blocks(of: Routing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SMALL", 0)
        assert_plan(of.ids_TK, of.experts)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        (64, 1024, 64),  # 4096 slots: the most that one block takes
        (512, 2048, 8),
        (4096, 1, 1),
        (4097, 3, 1),
        (700, 256, 8),
        (90, 2048, 64),
        (270_000, 5, 1),  # chunks of more than 256 slots
    ],
)
def test_sizes(tokens, experts, top_k):
    of = routing(0, tokens, experts, top_k, skew=0.3)
    assert_plan(of.ids_TK, experts)


def test_which_launches(lanes: Lanes):
    for tokens, expected in ((512, ["small"]), (513, ["count", "sum", "scatter"])):
        lanes.launches.clear()
        kernels.plan(routing(0, tokens, 16, 8).ids_TK, 16)
        assert lanes.launches == [f"moe_plan_{name}" for name in expected]


@pytest.mark.parametrize("slots", [64, 5000])
def test_all_tokens_on_one_expert(slots):
    assert_plan(torch.full((slots, 1), 6, dtype=torch.int32), 8)


@pytest.mark.parametrize("slots", [64, 5000])
def test_ids_that_are_no_expert_are_not_counted_and_write_nowhere(slots):
    wild_S = torch.randint(-9, 12, (slots, 1), dtype=torch.int32)
    wild_S[::7] = 2**31 - 1
    tame_S = torch.where((wild_S >= 0) & (wild_S < 4), wild_S, -1)
    assert_equal(kernels.plan(wild_S, 4), plan_twin(tame_S, 4))


def test_ids_that_do_not_lie_in_one_piece():
    ids_KT = torch.rand(8, 70).argsort(0).int()[:4]
    assert_plan(ids_KT.T, 8)


@pytest.mark.parametrize(
    ("ids_TK", "experts", "says"),
    [
        (torch.zeros(3, 1, dtype=torch.int32), 2049, "2048 experts at most, got 2049"),
        (torch.zeros(3, 65, dtype=torch.int32), 99, "64 choices a token at most, got 65"),
        (torch.zeros(1, 1, dtype=torch.int32).expand(2**30 + 1, 1), 9, "split the batch"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(ids_TK, experts, says):
    with pytest.raises(RuntimeInputError, match=says):
        kernels.plan(ids_TK, experts)
