"""From a load ratio to a shade: colour where the terminal has it, characters where not.

The scale is the same in every report, so that two can be compared: position r / (r + 1) for a load
of r times the mean, which puts the fair share in the middle and halves and doubles at equal
distances from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.color import Color
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

# Viridis at eleven even steps (matplotlib, CC0): even in lightness, so that it reads in any kind of
# colour blindness and in grey.
_VIRIDIS = (
    (68, 1, 84),
    (72, 36, 117),
    (65, 68, 135),
    (53, 95, 141),
    (42, 120, 142),
    (33, 145, 140),
    (34, 168, 132),
    (68, 191, 112),
    (122, 209, 81),
    (189, 223, 38),
    (253, 231, 37),
)

# (below this ratio, character): no plus or minus, since a number may follow
_STEPS = (
    (0.25, "."),
    (0.5, ":"),
    (0.8, "~"),
    (1.25, "="),
    (2.0, "o"),
    (4.0, "O"),
    (8.0, "#"),
    (float("inf"), "@"),
)

_LABELS = ((0.0, "0"), (0.25, "¼"), (0.5, "½"), (1.0, "1"), (2.0, "2"), (4.0, "4"), (8.0, "8"))

EMPTY = "×"
"""Marks an expert that nobody chose, with colour and without."""


def coloured(console: Console) -> bool:
    """The terminal shows enough colours for a ramp."""
    return console.color_system in ("truecolor", "256")


def shade(ratio: float) -> Style:
    """Background for a load of `ratio` times the mean, and a foreground that reads on it."""
    position = ratio / (ratio + 1) * (len(_VIRIDIS) - 1)
    low = min(int(position), len(_VIRIDIS) - 2)
    part = position - low
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)
    )
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 110
    return Style(
        color=Color.from_rgb(0, 0, 0) if bright else Color.from_rgb(235, 235, 235),
        bgcolor=Color.from_rgb(red, green, blue),
    )


def character(ratio: float) -> str:
    """A character that is the denser the higher the load."""
    return EMPTY if ratio == 0 else next(c for below, c in _STEPS if ratio < below)


def legend(console: Console) -> Text:
    """What the shades mean."""
    text = Text("load / mean: ", style="dim")
    if coloured(console):
        for ratio, label in _LABELS:
            text.append(f" {label} ", shade(ratio))
        text.append(f"  dark: cold, bright: hot, {EMPTY}: nobody chose it", style="dim")
        return text
    steps = [f"{c} <{below:g}" for below, c in _STEPS[:-1]]
    return text.append(" ".join([*steps, f"{_STEPS[-1][1]} more", f"{EMPTY} none"]))
