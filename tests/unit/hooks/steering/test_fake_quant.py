"""Rounded weights against torchao's, a plain loop, and every number that float8 has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import SteeringError
from moe_lens_hooks.steering.fake_quant import format_of

TORCHAO = json.loads((Path(__file__).parents[3] / "data/torchao/rounded.json").read_text("utf-8"))
"""By torchao 0.18: choose_qparams_affine (symmetric, -127 to 127 and so on, scale in float32),
quantize_affine, dequantize_affine with a block of a row or of 4; and its float8 twins."""

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("name", ["int8", "int4:4", "int2", "fp8"])
def test_the_numbers_are_those_of_torchao(name: str) -> None:
    weights, wanted = (torch.tensor(TORCHAO[key]) for key in ("weights", name))
    torch.testing.assert_close(format_of(name).rounded(weights), wanted, rtol=3e-7, atol=0)


def naive(row: list[float], top: int, group: int) -> list[float]:
    """One output's weights, rounded one after the other."""
    out = []
    for at in range(0, len(row), group):
        part = row[at : at + group]
        scale = max(abs(w) for w in part) / top
        out += [round(w / scale) * scale if scale else 0.0 for w in part]
    return out


@given(st.integers(2, 8), st.integers(1, 12), st.integers(1, 11), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_integers_are_what_a_loop_gives(bits: int, group: int, inputs: int, seed: int) -> None:
    """Also groups that do not divide the inputs; in float64: no tie is decided otherwise."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, inputs, generator=draw, dtype=torch.float64)
    matrix[1] = 0
    wanted = [naive(row, 2 ** (bits - 1) - 1, group) for row in matrix.tolist()]
    got = format_of(f"int{bits}:{group}").rounded(matrix)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_float8_is_the_nearest_number_that_there_is() -> None:
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double() ** 3
    got = format_of("fp8").rounded(matrix)
    finite = E4M3[E4M3.isfinite()].double()
    for row, rounded in zip(matrix, got, strict=True):
        scale = row.abs().max() / 448
        off = (row[:, None] / scale - finite).abs().min(1).values * scale
        torch.testing.assert_close((row - rounded).abs(), off, rtol=0, atol=1e-12)


def test_scales_are_of_outputs_and_below_eight_bits_of_128_inputs() -> None:
    matrix = torch.full((2, 256), 0.01)
    matrix[0, 0] = 1000.0  # takes the others with it, as far as its scale goes
    for name, lost in (("int8", 255), ("int8:128", 127), ("int4", 127), ("int4:32", 31)):
        got = format_of(name).rounded(matrix)
        assert int((got[0] == 0).sum()) == lost, name
        torch.testing.assert_close(got[1], matrix[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_type_and_are_rounded_in_float32_at_least(dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    kind = torch.promote_types(dtype, torch.float32)
    for name in ("int8", "int4", "fp8"):
        got = format_of(name).rounded(matrix)
        assert got.dtype == dtype
        assert torch.equal(got, format_of(name).rounded(matrix.to(kind)).to(dtype))


def test_what_is_on_the_grid_stays_bit_for_bit() -> None:
    matrix = torch.arange(-127, 128).float().view(5, 51)
    matrix[:, 0] = 127.0
    assert torch.equal(format_of("int8").rounded(matrix), matrix)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_no_scale_fits_are_refused(bad: float) -> None:
    matrix = torch.ones(2, 4)
    matrix[1, 2] = bad
    with pytest.raises(SteeringError, match="NaN or infinite"):
        format_of("int8").rounded(matrix)


@pytest.mark.parametrize("name", ["int1", "int9", "int16", "fp4", "", "int4:0", "int4:", "INT8"])
def test_a_format_that_is_none(name: str) -> None:
    with pytest.raises(SteeringError, match=r"is none of fp8, int8"):
        format_of(name)
