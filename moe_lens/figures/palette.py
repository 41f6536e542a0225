"""Colours: told apart in any kind of colour blindness, on paper and on a dark screen.

The ramps are even in CIELAB lightness, which is what the eye reads first; made in OKLCH at even
steps of L*. `RATIO` has a natural centre, 1: what is as expected fades into the background, cold is
blue, hot is orange. `NEVER` is further from every colour of its ramp than the ramp's own steps are
from each other, also as a protanope, a deuteranope and a tritanope see them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """The colours of one look."""

    paper: str
    text: str
    muted: str
    """Notes, ticks, and lines that only guide the eye."""
    grid: str
    lines: tuple[str, ...]
    """Kinds of things, in the order in which they are used: after Okabe and Ito."""
    amount: tuple[str, ...]
    """Nothing to much."""
    ratio: tuple[str, ...]
    """Far below to far above, expected in the middle."""
    never: str
    """What did not happen at all: an expert that nobody chose."""


LIGHT = Palette(
    paper="#ffffff",
    text="#1f2430",
    muted="#6b7280",
    grid="#e5e7eb",
    lines=(
        "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4b8a", "#8c6d1f",
    ),
    amount=(
        "#f3f7f8", "#c6e5f0", "#93d3ed", "#60bfec", "#2ea8e8", "#0e91da", "#027ac9", "#1e63ad",
        "#294f8a", "#2b3d62", "#262c3c",
    ),
    ratio=(
        "#024f9c", "#2c6fbf", "#5c90d1", "#8bb1e2", "#bcd2ef", "#f2f4f6", "#edc9b9", "#dda186",
        "#c97954", "#b3511c", "#893602",
    ),
    never="#000000",
)  # fmt: skip

DARK = Palette(
    paper="#0e1117",
    text="#e6e8ee",
    muted="#9aa3b2",
    grid="#262b36",
    lines=(
        "#56b4e9", "#f0803c", "#12936a", "#e29cc4", "#f0b429", "#4a90d9", "#a596dc", "#c8ab5a",
    ),
    amount=(
        "#232831", "#263955", "#204c79", "#056099", "#0476ab", "#008cbe", "#00a3cf", "#45b8d8",
        "#7ecbdc", "#b3dde2", "#e6ecec",
    ),
    ratio=(
        "#96d3fe", "#4bb3f4", "#4490c2", "#3c6f91", "#354f62", "#2f3132", "#5f4834", "#8b613b",
        "#b97c42", "#e9984a", "#febf88",
    ),
    never="#ffffff",
)  # fmt: skip
