"""Which two windows of steps a comparison is of, as texts of a link. No Streamlit here."""

from __future__ import annotations

import re

Window = tuple[int, int]
"""First and last step, inclusive."""

_TEXT = re.compile(r"([0-9]{1,15})-([0-9]{1,15})")


def window(text: str | None) -> Window | None:
    """A window from its text, as 0-99; None where it is none."""
    found = _TEXT.fullmatch(text or "")
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    return (first, last) if first <= last else None


def in_link(window: Window) -> str:
    """A window as its text."""
    return f"{window[0]}-{window[1]}"


def halves(first: int, last: int) -> tuple[Window, Window]:
    """The two halves of these steps; of a single step: that step, twice."""
    middle = (first + last) // 2
    return (first, middle), (min(middle + 1, last), last)
