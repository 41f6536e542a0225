"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from moe_lens.numbers import count, finite, percent, times


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


def test_json_has_null_for_what_is_no_number() -> None:
    found = finite({"a": [1.5, math.nan, {"b": math.inf}], "c": "x", "d": None, "e": 3})
    assert found == {"a": [1.5, None, {"b": None}], "c": "x", "d": None, "e": 3}
