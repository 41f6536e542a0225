"""The emulation finds what it is there to find: kernels that lack a barrier, or write too far."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from support.cuda_on_cpu import Lanes, library
from support.cuda_tools import compiler_of_cpp
from support.routing_twin import plan_twin
from support.routings import routing

from moe_lens.runtime import reference
from moe_lens.runtime.cuda import compiler, kernels
from moe_lens.runtime.plan import Placed

BARRIERS = (
    "__syncwarp();  // all peers have read the count before",
    "__syncwarp();  // all peers have read the row before",
    "__syncthreads();  // warp_votes have been read",
)
PARTLY = ("__syncthreads();  // all threads see the last end", "if (lane) __syncthreads();")
TOO_FAR = ("if (e >= 0) slot_S[row] = s;", "if (e >= 0) slot_S[row + 1] = s;")


def broken(monkeypatch, *edits: tuple[str, str]) -> Lanes:
    text = compiler.source()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    lanes = Lanes(text)
    monkeypatch.setattr(kernels, "launch", lanes.launch)
    return lanes


def plan_is_right() -> bool:
    of = routing(0, 200, 4, 2, none=0.0)
    try:
        got = kernels.plan(of.ids_TK, 4)
    except AssertionError:  # it wrote past a tensor
        return False
    return np.array_equal(got.slot_S, plan_twin(of.ids_TK.numpy(), 4)[1])


def select_is_right() -> bool:
    """Of 2,000 slots with one of two priorities, all of the larger one are kept, and 500 more."""
    ids_TK = torch.zeros(2000, 1, dtype=torch.int32)
    large_S = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.5
    where = reference.plan(ids_TK, 1)
    left_E = torch.tensor([int(large_S.sum()) + 500], dtype=torch.int32)
    placed = Placed(torch.full_like(ids_TK, -1), torch.full_like(ids_TK, -1))
    kernels._select(where, left_E, large_S.float(), None, placed)
    expected_S = large_S | ((~large_S).cumsum(0) <= 500)
    return torch.equal(placed.expert_ids_TK[:, 0] == 0, expected_S)


def test_a_missing_barrier_is_noticed(monkeypatch, lanes):
    assert plan_is_right()
    assert select_is_right()
    broken(monkeypatch, *((line, line.partition(";")[2]) for line in BARRIERS))
    assert not all(plan_is_right() for _ in range(10))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "SMALL", 0)
        assert not all(plan_is_right() for _ in range(10))
    assert not all(select_is_right() for _ in range(10))


def test_a_barrier_that_some_threads_miss_and_a_write_past_the_end_are_errors(monkeypatch):
    broken(monkeypatch, PARTLY, TOO_FAR)
    full_TK = torch.zeros(8, 1, dtype=torch.int32)
    with pytest.raises(AssertionError, match="deadlock"):
        kernels.plan(full_TK, 1)
    monkeypatch.setattr(kernels, "SMALL", 0)
    with pytest.raises(AssertionError, match="moe_plan_scatter wrote past a tensor"):
        kernels.plan(full_TK, 1)


def test_arguments_must_have_the_sizes_of_the_parameters():
    lanes = Lanes()
    assert lanes.library is library(None)  # compiled once
    device = torch.device("cpu")
    with pytest.raises(AssertionError, match="sizes"):
        lanes.launch(
            "moe_plan_sum", (1, 1), 32, torch.zeros(1), np.int64(1), 1, None, device=device
        )
    with pytest.raises(AssertionError, match="no such kernel"):
        lanes.launch("moe_plan", (1, 1), 32, device=device)
    with pytest.raises(AssertionError, match="refuses"):
        lanes.launch("moe_plan_sum", (0, 1), 32, None, 1, 1, None, device=device)


def test_every_kernel_is_run_by_these_tests():
    """What is listed here and what a test launches: `moe_flush_l2` alone has no result to test."""
    tested = {"plan", "capacity", "permute", "swiglu", "combine", "flush_l2"}
    assert {part for part in compiler.PARTS if part != "prelude"} == tested
    assert {path.stem for path in compiler.CSRC.glob("*.cu")} == set(compiler.PARTS)
    assert len(compiler.kernel_names()) == 4 + 2 + 4 + 6 + 6 + 1


def test_a_missing_tool_skips_and_fails_under_ci(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("MOE_LENS_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no g\+\+ on PATH"):
        compiler_of_cpp()
    monkeypatch.setenv("MOE_LENS_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match=r"no g\+\+ on PATH"):
        compiler_of_cpp()
