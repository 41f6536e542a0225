"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from moe_lens.numbers import count, counted, digits, finite, percent, times


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


def test_one_thing_is_no_plural() -> None:
    assert [counted(n, "step") for n in (0, 1, 2, 12345)] == [
        "0 steps", "1 step", "2 steps", "12,345 steps"]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.8e-127, "<1e-12"), (9.9e-13, "<1e-12"), (2e-12, "2.0e-12"), (-3e-17, ">-1e-12"),
     (7.1e-06, "7.1e-06"), (0.25, "0.2500"), (1234.5, "1,234"), (math.nan, "")],
)  # fmt: skip
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_json_has_null_for_what_is_no_number() -> None:
    found = finite({"a": [1.5, math.nan, {"b": math.inf}], "c": "x", "d": None, "e": 3})
    assert found == {"a": [1.5, None, {"b": None}], "c": "x", "d": None, "e": 3}
