"""permute, swiglu and combine, as the kernels compute them, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu import Lanes
from support.routings import Routing, routing, routings

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime.cuda import kernels
from moe_lens.runtime.plan import Plan

pytestmark = pytest.mark.usefixtures("lanes")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8 * 1.001, torch.float16: 2**-11 * 1.01}
WIDTHS = st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 40, 2056])


def close(got: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor | float = 0.0) -> None:
    """Rounded once: half a unit in the last place, and what float32 sums lose (`slack`)."""
    assert not got.isnan().any()
    error = (got.double() - exact).abs()
    bound = ROUNDING[got.dtype] * exact.abs() + slack + 1e-7
    assert (error <= bound).all(), (error / bound).max()


def plan_of(of: Routing) -> Plan:
    return kernels.plan(of.ids_TK, of.experts)


def poisoned(rows: int, width: int, running: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random rows, NaN from `running` on."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[running:] = torch.nan
    return x


@settings(max_examples=60, deadline=None)
@given(routings(20), WIDTHS, st.sampled_from([*DTYPES, torch.float64, torch.int64]))
def test_permute(of: Routing, width, dtype):
    where = plan_of(of)
    x_TD = (torch.randn(len(of.ids_TK), width) * 99).to(dtype)
    x_SD = kernels.permute(x_TD, where)
    assert x_SD.shape == (of.ids_TK.numel(), width)
    running = int(where.ends_E[-1])
    token_R = where.slot_S[:running] // of.ids_TK.shape[1]
    assert torch.equal(x_SD[:running], x_TD[token_R.long()])


@settings(max_examples=60, deadline=None)
@given(routings(20), WIDTHS, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 99))
def test_combine(of: Routing, width, dtype, weight_dtype, seed):
    where = plan_of(of)
    y_SD = poisoned(of.ids_TK.numel(), width, int(where.ends_E[-1]), dtype, seed)
    weights_TK = torch.rand(of.ids_TK.shape).to(weight_dtype)
    weights_TK[of.ids_TK < 0] = torch.nan  # of slots that do not run
    y_TD = kernels.combine(y_SD, where, weights_TK)
    assert y_TD.shape == (len(of.ids_TK), width)
    assert y_TD.dtype == dtype
    exact, size = torch.zeros(2, len(of.ids_TK), width, dtype=torch.float64)
    for t in range(len(of.ids_TK)):
        for k in range(of.ids_TK.shape[1]):
            if of.ids_TK[t, k] >= 0:
                part = y_SD[where.row_TK[t, k]].double() * weights_TK[t, k].double()
                exact[t] += part
                size[t] += part.abs()
    close(y_TD, exact, size * 1e-6)


def test_combine_sums_in_the_order_of_the_choices():
    ids_TK = torch.tensor([[2, 1, 0], [0, 2, 1]], dtype=torch.int32)
    where = kernels.plan(ids_TK, 3)
    y_SD = torch.zeros(6, 4)
    for t, values in enumerate([(1e8, 1.0, -1e8), (1e8, -1e8, 1.0)]):
        for k, value in enumerate(values):
            y_SD[where.row_TK[t, k]] = value
    assert kernels.combine(y_SD, where, torch.ones(2, 3))[:, 0].tolist() == [0.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), WIDTHS, st.sampled_from(DTYPES), st.integers(0, 99))
def test_swiglu(running, unused, width, dtype, seed):
    gate_up_S2F = poisoned(running + unused, 2 * width, running + unused, dtype, seed) * 3
    h_SF = kernels.swiglu(gate_up_S2F, torch.tensor([0, running], dtype=torch.int32))
    assert h_SF.shape == (running + unused, width)
    gate, up = gate_up_S2F[:running].double().chunk(2, dim=1)
    close(h_SF[:running], gate / (1 + torch.exp(-gate)) * up)
    assert h_SF[running:].isnan().all()  # not written, though what it would be is a number
    every = kernels.swiglu(gate_up_S2F)
    assert torch.equal(every[:running], h_SF[:running])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_large_gates(dtype):
    gate = torch.tensor([-200.0, -88.5, -30.0, 0.0, 30.0, 100.0, 1000.0, 60000.0]).to(dtype)
    h = kernels.swiglu(torch.cat([gate, torch.ones(8, dtype=dtype)])[None])[0]
    exact = gate.double() / (1 + torch.exp(-gate.double()))
    close(h, exact, 1e-6)


def test_units_follow_length_and_alignment(lanes: Lanes):
    where = kernels.plan(torch.zeros(4, 1, dtype=torch.int32), 1)
    for width, offset, unit, words in ((8, 0, 16, 8), (8, 2, 4, 1), (4, 0, 8, 1), (5, 0, 2, 1)):
        x = torch.randn(4 * width + offset).bfloat16()[offset:].view(4, width)
        lanes.launches.clear()
        y = kernels.combine(kernels.permute(x, where), where, torch.ones(4, 1))
        assert torch.equal(x, y)
        combined = 8 if width % 8 == 0 else 1  # its input is newly allocated, so aligned
        assert lanes.launches == [f"moe_permute_{unit}", f"moe_combine_bfloat16_{combined}"]
        kernels.swiglu(torch.randn(2 * width + offset).bfloat16()[offset:].view(1, -1))
        assert lanes.launches[-1] == f"moe_swiglu_bfloat16_{words}"


def test_what_lies_in_pieces_is_taken():
    of = routing(0, 6, 4, 2)
    where = plan_of(of)
    x_TD = torch.randn(16, 6).T
    x_SD = kernels.permute(x_TD, where)
    assert torch.equal(x_SD, kernels.permute(x_TD.contiguous(), where)) or x_SD.isnan().any()
    wide_SD = torch.randn(12, 32)[:, ::2]
    weights_TK = torch.rand(2, 6).T
    torch.testing.assert_close(
        kernels.combine(wide_SD, where, weights_TK),
        kernels.combine(wide_SD.contiguous(), where, weights_TK.contiguous()),
        rtol=0,
        atol=0,
    )


def test_nothing_comes_of_nothing():
    where = kernels.plan(torch.zeros(0, 2, dtype=torch.int32), 3)
    assert kernels.permute(torch.zeros(0, 8), where).shape == (0, 8)
    assert kernels.combine(torch.zeros(0, 8), where, torch.zeros(0, 2)).shape == (0, 8)
    assert kernels.swiglu(torch.zeros(0, 8), where.ends_E).shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda plan: kernels.permute(torch.zeros(2, 3).byte(), plan), "rows of 3 bytes"),
        (lambda _: kernels.swiglu(torch.zeros(3, 4).double()), "gate_up is torch.float64"),
        (
            lambda plan: kernels.combine(torch.zeros(4, 8).double(), plan, torch.zeros(2, 2)),
            "y is torch.float64",
        ),
        (
            lambda plan: kernels.combine(torch.zeros(4, 8), plan, torch.zeros(2, 2).int()),
            "got torch.int32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    where = kernels.plan(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 2)
    with pytest.raises(RuntimeInputError, match=says):
        call(where)
