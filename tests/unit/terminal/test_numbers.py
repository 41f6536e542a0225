"""Numbers for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.terminal.numbers import compact, count, percent, times


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1e-9, "<0.01 %"),
        (0.0123, "1.23 %"),
        (0.5, "50.0 %"),
        (1.0, "100.0 %"),
    ],
)
def test_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_count_and_times() -> None:
    assert count(1234567) == "1,234,567"
    assert times(2.44) == "2.4×"
    assert times(123.4) == "123×"


@given(n=st.integers(0, 10**13), width=st.integers(3, 7))
def test_compact_keeps_the_width_and_the_size(n: int, width: int) -> None:
    text = compact(n, width)
    assert len(text) <= width
    unit = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1], 1)
    value = float(text.rstrip("kMGT")) * unit
    # one digit in three characters: 1.4M may read 1M
    assert abs(value - n) <= 0.5 * max(n, 1)
