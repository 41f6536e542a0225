"""Bytes and seconds of misses."""

from __future__ import annotations

import pytest

from moe_lens.metrics.stall import expert_bytes, stall_seconds


def test_an_expert_of_mixtral() -> None:
    # 8 x 7B: 4096 x 14336, three matrices, two bytes: 352 MB, 14 ms over 25 GB/s.
    size = expert_bytes(4096, 14336)
    assert size == 3 * 4096 * 14336 * 2 == 352_321_536
    assert stall_seconds(1, size) == pytest.approx(0.01409286)
    assert stall_seconds(2.5, size, 100) == pytest.approx(2.5 * 352_321_536 / 100e9)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("int4", 0.5), ("int8", 1)])
def test_types(dtype: str, bytes_each: float) -> None:
    assert expert_bytes(2, 3, dtype) == 18 * bytes_each


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16.*got 'int3'"):
        expert_bytes(2, 3, "int3")
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0 GB/s"):
            stall_seconds(1, 1, bad)
