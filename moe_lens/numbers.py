"""Numbers for people: thousands separators, no more digits than mean something; and for JSON."""

from __future__ import annotations

import math

NONE = "–"
TINY = 1e-12
"""Below it digits of a number say no more than that it is all but nothing."""


def count(n: float | None) -> str:
    """A whole number, as 12,345."""
    return NONE if n is None else f"{n:,.0f}"


def counted(n: float, noun: str) -> str:
    """A number of things, as 1 step or 12,345 steps."""
    return f"{count(n)} {noun}{'s' * (n != 1)}"


def percent(share: float | None) -> str:
    """A share of 1 in percent: 0 is exactly none, and a trace of something never shows as 0."""
    if share is None or math.isnan(share):
        return NONE
    if share == 0:
        return "0"
    value = 100 * share
    if value < 0.01:
        return "<0.01 %"
    return f"{value:.2f} %" if value < 10 else f"{value:.1f} %"


def decimal(value: float | None, digits: int = 2) -> str:
    """A fixed number of decimals."""
    return NONE if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def digits(value: float | None) -> str:
    """About four digits that mean something; nothing: no number.

    Below 1e-12 in size, where many a chance is, only that much is said of it.
    """
    if value is None or math.isnan(value):
        return ""
    if 0 < abs(value) < TINY:
        return f"<{TINY:g}" if value > 0 else f">-{TINY:g}"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    places = 0 if value == int(value) or abs(value) >= 1000 else 2 if abs(value) >= 10 else 4
    return f"{value:,.{places}f}"


def times(ratio: float | None) -> str:
    """A ratio, as 2.4×."""
    if ratio is None or math.isnan(ratio):
        return NONE
    return f"{ratio:.0f}×" if ratio >= 99.5 else f"{ratio:.1f}×"


def finite(value: object) -> object:
    """A value as JSON can say it: null for NaN and infinity, lists and dicts all through."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return value
