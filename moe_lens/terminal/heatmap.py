"""Layers × experts: how many tokens each expert was chosen for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from moe_lens.terminal.ramp import EMPTY, character, coloured, legend, shade

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


_WIDEST = 7
_DIGITS = 3  # a cell that holds fewer shows no number
_UNITS = {1: "", 10**3: "thousands of ", 10**6: "millions of ", 10**9: "billions of "}


@dataclass
class _Cell:
    """One or, where the terminal is narrow, several neighbouring experts."""

    routed: float
    """Choices per expert."""
    ratio: float


class HeatMap:
    """A rich renderable of `load_map` rows: a line a layer, a cell an expert."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.layers: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            self.layers[row["layer"]].append(row)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label = len(f"layer {max(self.layers)}") + 1
        experts = max(len(rows) for rows in self.layers.values())
        room = max(options.max_width - label, 8)
        per_cell = -(-experts // room)
        cells = -(-experts // per_cell)
        width = min(room // cells, _WIDEST)
        # One unit for the whole map, so that its numbers can be compared as they stand.
        digits = width - 1  # beside a gap, or a mark
        most = max(row["routed"] for rows in self.layers.values() for row in rows)
        fitting = (u for u in _UNITS if len(f"{most / u:.0f}") <= digits)
        unit = next(fitting, None) if digits >= _DIGITS and per_cell == 1 else None
        yield _axis(label, experts, per_cell, width)
        for layer, rows in sorted(self.layers.items()):
            line = Text(f"layer {layer}".ljust(label), no_wrap=True)
            for cell in _binned(rows, per_cell):
                line.append(*_drawn(cell, width, unit, coloured(console)))
            yield line
        yield Text()
        yield legend(console)
        if per_cell > 1:
            yield Text(
                f"A cell is the mean of {per_cell} neighbouring experts: {experts} do not fit "
                f"{options.max_width} columns.",
                style="dim",
            )
        elif unit is not None:
            yield Text(
                f"Numbers: {_UNITS[unit]}choices of the expert by valid tokens.", style="dim"
            )


def _binned(rows: list[dict[str, Any]], per_cell: int) -> list[_Cell]:
    cells = []
    for start in range(0, len(rows), per_cell):
        part = rows[start : start + per_cell]
        cells.append(
            _Cell(
                sum(r["routed"] for r in part) / len(part),
                sum(r["ratio"] or 0.0 for r in part) / len(part),
            )
        )
    return cells


def _drawn(cell: _Cell, width: int, unit: int | None, colour: bool) -> tuple[str, Any]:
    number = f"{cell.routed / unit:.0f}" if unit and cell.ratio else ""
    if not colour:
        mark = character(cell.ratio)
        if unit:
            return f"{mark}{number}".ljust(width), None
        return (mark * (width - 1) + " " if width > 1 else mark), None
    text = number or (EMPTY if cell.ratio == 0 else "")
    return text.center(width) if width > 1 else text or " ", shade(cell.ratio)


def _axis(label: int, experts: int, per_cell: int, width: int) -> Text:
    """Expert ids over the cells, as many as fit without touching."""
    line = "expert".ljust(label)
    for first in range(0, experts, per_cell):
        at = label + first // per_cell * width
        wanted = str(first)
        # round numbers only, once not every cell has one
        gap = 1 if width > len(str(experts)) else 8
        if first // per_cell % gap == 0 and len(line) <= at:
            line = line.ljust(at) + wanted + " "
    return Text(line.rstrip(), style="dim", no_wrap=True)
