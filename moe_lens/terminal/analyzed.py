"""Routing metrics: a row a metric, a column a layer, each value beside chance."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

Said = dict[str, Any]

_INDENT = 2
_NAME, _CELL = 24, 19
"""Columns that a name, and a layer, take."""
_MARKS = {"high": "▲", "low": "▼", "": " "}
_EXPLAINED = (
    "chance: a router that draws experts uniformly, with as many tokens and choices, tokens "
    "independent of each other; or the value named in docs/metrics.md. ▲ ▼: beyond all such draws "
    "(999 of a layer, 199 of its forwards). With many tokens small differences are beyond chance "
    "too: look at the size."
)


def print_phase(console: Console, phase: Said) -> None:
    """Print what was found of a phase, its answer first.

    Args:
        console: Where to.
        phase: `answer`, `catalogue` (name, group, unit, level), `layers` (layer, metrics by name)
            and `lacking` (what, which metrics and layers), as `commands.analyze` makes them.
    """
    print_plain(console, Text(phase["answer"], style="bold"))
    each = max(1, (console.width - _NAME - _INDENT) // _CELL)
    for group in dict.fromkeys(m["group"] for m in phase["catalogue"]):
        rows = [m for m in phase["catalogue"] if m["group"] == group and _has(phase, m["name"])]
        for first in range(0, len(phase["layers"]) if rows else 0, each):
            layers = phase["layers"][first : first + each]
            title = Text(group if first == 0 else f"{group}, continued", style="bold")
            print_plain(console, "", title)
            print_plain(console, Padding.indent(_table(rows, layers), _INDENT))
    if phase["lacking"]:
        print_plain(console, "", Text("not computed", style="bold"))
        print_plain(console, Padding.indent(_lacking(phase), _INDENT))
    print_plain(console, notes(_EXPLAINED), "")


def _table(rows: list[Said], layers: list[Said]) -> RenderableType:
    made = table("metric")
    add_numbers(made, *(head for x in layers for head in (f"layer {x['layer']}", "chance")))
    for metric in rows:
        cells = [x["metrics"][metric["name"]] for x in layers]
        add_row(made, metric["name"], *(text for cell in cells for text in _cells(cell)))
    return made


def _cells(cell: Said) -> tuple[str, str]:
    if cell["lacks"]:
        return "–  ", ""
    return f"{number(cell['value'])} {_MARKS[cell['beyond']]}", number(cell["chance"])


def number(value: float | None) -> str:
    """Four digits that mean something; nothing where there is no number."""
    if value is None or math.isnan(value):
        return ""
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = 0 if value == int(value) or abs(value) >= 1000 else 2 if abs(value) >= 10 else 4
    return f"{value:,.{digits}f}"


def _has(phase: Said, name: str) -> bool:
    return any(not x["metrics"][name]["lacks"] for x in phase["layers"])


def _lacking(phase: Said) -> Group:
    every = len(phase["layers"])
    lines = []
    for row in phase["lacking"]:
        few = f" (layer{'s' * (len(row['layers']) > 1)} {', '.join(map(str, row['layers']))})"
        where = "" if len(row["layers"]) == every else few
        lines.append(Text(f"{', '.join(row['metrics'])}{where}: {row['lacks']}."))
    return Group(*lines)
