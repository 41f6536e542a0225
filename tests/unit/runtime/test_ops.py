"""The ops that move and multiply rows: the CPU path and the reference, against loops."""

from __future__ import annotations

import pytest
import torch

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime import ops

PATHS = pytest.mark.parametrize("reference", [True, False], ids=["reference", "cpu"])
PRODUCTS = pytest.mark.parametrize("product", ["reference", "loop", "grouped_mm"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

T, K, E, D, F = 13, 3, 6, 16, 8


@pytest.fixture(params=["whole", "dropped", "one expert", "one token", "none"])
def ids(request):
    """Ids of 13 tokens: all run, some dropped, all on one expert; one token; none that runs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(T, E, generator=generator).argsort(1)[:, :K].int()
    if request.param == "dropped":
        ids[torch.rand(T, K, generator=generator) < 0.4] = -1
    if request.param == "one expert":
        ids = torch.full((T, 1), 4, dtype=torch.int32)
    return {"one token": ids[:1], "none": torch.full_like(ids, -1)}.get(request.param, ids)


def error(found, wanted):
    """Relative L2 distance."""
    scale = wanted.double().norm()
    return float((found.double() - wanted.double()).norm() / scale.clamp(min=1e-30))


def rows(plan, width, dtype=torch.float32, poison=torch.nan):
    """Random rows; those that no slot owns are poisoned."""
    torch.manual_seed(2)
    y = torch.randn(len(plan.slot_S), width).to(dtype)
    y[plan.ends_E[-1] :] = poison
    return y


@PATHS
def test_permute_gives_each_row_its_token(reference, ids):
    plan = ops.plan(ids, E)
    x = torch.randn(len(ids), D)
    x_SD = ops.permute(x, plan, reference=reference)
    assert x_SD.shape == (ids.numel(), D)
    for row, slot in enumerate(plan.slot_S.tolist()):
        assert slot < 0 or torch.equal(x_SD[row], x[slot // ids.shape[1]])


@PRODUCTS
@DTYPES
def test_each_row_meets_its_experts_weights(product, dtype, ids):
    plan = ops.plan(ids, E)
    x, w = rows(plan, D, dtype), torch.randn(E, F, D).to(dtype)
    y = ops.grouped_mm(x, w, plan.ends_E, backend=product)
    wanted = torch.stack(
        [
            x[row].double() @ w[ids.flatten()[slot]].double().T
            for row, slot in enumerate(plan.slot_S.tolist())
            if slot >= 0
        ]
        or [torch.zeros(F)]
    )
    runs = int(plan.ends_E[-1])
    assert y.dtype == dtype
    assert error(y[:runs], wanted[:runs]) < {torch.float32: 1e-6}.get(dtype, 4e-3)


@PATHS
@DTYPES
def test_swiglu_is_silu_of_the_gate_times_up(reference, dtype):
    gate_up = (3 * torch.randn(700, 2 * 400)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    h = ops.swiglu(gate_up, reference=reference)
    wanted = gate * torch.sigmoid(gate) * up
    # Rounded once: what float64 gives, rounded, up to float32's own error.
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert h.dtype == dtype
    assert ((h.double() - wanted).abs() <= close * wanted.abs() + 1e-6).all()


@PATHS
def test_swiglu_leaves_out_the_rows_of_no_slot(reference):
    gate_up = torch.randn(6, 8)
    gate_up[4:] = torch.nan
    ends = torch.tensor([1, 4], dtype=torch.int32)
    h = ops.swiglu(gate_up, ends, reference=reference)
    assert h.shape == (6, 4)
    assert torch.equal(h[:4], ops.swiglu(gate_up[:4], reference=reference))


def test_swiglu_leaves_its_input_as_it_was():
    gate_up = torch.randn(4, 8)
    before = gate_up.clone()
    ops.swiglu(gate_up)
    assert torch.equal(gate_up, before)


@PATHS
@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_sums_a_tokens_rows(reference, dtype, weight_dtype, ids):
    plan = ops.plan(ids, E)
    y, weights = rows(plan, D, dtype), torch.rand(ids.shape).to(weight_dtype)
    found = ops.combine(y, plan, weights, reference=reference)
    wanted = torch.zeros(len(ids), D, dtype=torch.float64)
    for t, k in torch.nonzero(ids >= 0).tolist():
        wanted[t] += weights[t, k].double() * y[plan.row_TK[t, k]].double()
    rounded = wanted.to(dtype)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    # The gate weights keep more bits than the rows have: at most a last bit is off, and rarely.
    assert error(found, wanted) <= 1.05 * error(rounded, wanted) + 1e-6


@PATHS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_of_no_slot_do_not_leak(reference, poison):
    ids = torch.tensor([[1, -1], [-1, -1], [0, 2]], dtype=torch.int32)
    plan = ops.plan(ids, E)
    y = rows(plan, D, poison=poison)
    out = ops.combine(
        y, plan, torch.full((3, 2), torch.nan).where(ids < 0, 1.0), reference=reference
    )
    assert torch.isfinite(out).all()
    assert (out[1] == 0).all()


@PATHS
def test_gate_weights_in_float64_are_taken(reference, ids):
    plan = ops.plan(ids, E)
    y, weights = rows(plan, D), torch.rand(ids.shape, dtype=torch.float64)
    found = ops.combine(y, plan, weights, reference=reference)
    assert torch.equal(found, ops.combine(y, plan, weights.float(), reference=reference))
    # Where sums are float64, no bit of a weight is lost.
    exact = ops.combine(y.double(), plan, weights, reference=reference)
    lossy = ops.combine(y.double(), plan, weights.float(), reference=reference)
    assert torch.equal(exact, lossy) == (not (ids >= 0).any())


@pytest.mark.parametrize(
    ("rows_dtype", "given"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_no_kernel_gets_gate_weights_of_more_bits_than_its_sums(rows_dtype, given, monkeypatch):
    seen = []

    class Kernels:
        @staticmethod
        def combine(y_SD, plan, weights_TK):
            seen.append(weights_TK.dtype)
            return y_SD

    plan = ops.plan(torch.zeros(2, 1, dtype=torch.int32), E)
    monkeypatch.setattr(ops, "_home", lambda *_: Kernels)
    ops.combine(torch.zeros(2, D, dtype=rows_dtype), plan, torch.ones(2, 1).double())
    assert seen == [given]


@PATHS
def test_no_tokens_give_no_rows(reference):
    ids = torch.empty(0, 2, dtype=torch.int32)
    plan = ops.plan(ids, E, reference=reference)
    x = ops.permute(torch.empty(0, D), plan, reference=reference)
    y = ops.grouped_mm(x, torch.randn(E, F, D), plan.ends_E)
    assert plan.ends_E.tolist() == [0] * E
    assert ops.swiglu(torch.empty(0, 8), reference=reference).shape == (0, 4)
    out = ops.combine(y, plan, torch.empty(0, 2), reference=reference)
    assert out.shape == (0, F)


def test_shapes_that_do_not_fit_are_refused():
    plan = ops.plan(torch.zeros(2, 1, dtype=torch.int32), E)
    for call, said in [
        (lambda: ops.permute(torch.zeros(3, D), plan), r"x must be \[2, hidden\]"),
        (lambda: ops.swiglu(torch.zeros(3, 5)), r"2 \* intermediate\], got \[3, 5\]"),
        (
            lambda: ops.combine(torch.zeros(2, D), plan, torch.zeros(2, 2)),
            r"floating point \[2, 1\] as the ids are, got torch.float32 \[2, 2\]",
        ),
        (
            lambda: ops.combine(torch.zeros(2, D), plan, torch.zeros(2, 1).int()),
            "got torch.int32",
        ),
        (
            lambda: ops.combine(torch.zeros(3, D), plan, torch.zeros(2, 1)),
            r"y must be \[2, hidden\], a row a slot, got \[3, ",
        ),
        (
            lambda: ops.grouped_mm(torch.zeros(2, D), torch.zeros(E, F, 3), plan.ends_E),
            "do not fit",
        ),
        (
            lambda: ops.grouped_mm(
                torch.zeros(2, D), torch.zeros(E, F, D), plan.ends_E, backend="cutlass"
            ),
            "no grouped matrix product 'cutlass'",
        ),
    ]:
        with pytest.raises(RuntimeInputError, match=said):
            call()


def test_flushing_a_cpu_does_nothing():
    ops.flush_l2(torch.device("cpu"))


def test_emptying_the_cache_of_a_gpu_needs_no_kernels(monkeypatch):
    flushed = []

    def missing():
        raise RuntimeUnavailable("cuda.core is not installed")

    monkeypatch.setattr(ops, "_kernels", missing)
    monkeypatch.setattr(ops.plain, "flush_l2", flushed.append)
    ops.flush_l2(torch.device("cpu"))
    ops.flush_l2(torch.device("cuda", 0))
    assert flushed == [torch.device("cuda", 0)]
