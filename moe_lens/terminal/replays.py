"""What replays of the run measured, in short: a row for each result and phase."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from moe_lens.numbers import NONE, count, times
from moe_lens.terminal.grid import add_numbers, add_row, notes, table

if TYPE_CHECKING:
    from moe_lens.report.answers import Answers

Row = dict[str, Any]


def replays(answers: Answers) -> list[RenderableType]:
    """The table, and what its columns mean; nothing where the run was not replayed."""
    if not answers.replayed:
        return []
    parts: list[RenderableType] = []
    for result, of_result in groupby(answers.replayed, key=lambda row: row["result"]):
        made = table("phase")
        add_numbers(made, "layers", "forwards", "time/\nfloor", "time/\ntwin", "costliest\nlayer")
        for phase, of_phase in groupby(of_result, key=lambda row: row["phase"]):
            add_row(made, phase, *_cells(list(of_phase)))
        parts.append(Group(*([""] if parts else []), Text(result, overflow="fold"), made))
    parts.append(
        notes(
            "Times over the layers, least to most. time/twin: beside as many rows spread evenly "
            "over all experts; ≈: no layer differs by more than the A/A noise."
        )
    )
    return parts


def _cells(layers: list[Row]) -> list[str]:
    beyond = [row for row in layers if _differs(row)]
    costliest = max(beyond, key=lambda row: row["over_balanced"], default=None)
    ratios = [row["over_balanced"] for row in layers if row["over_balanced"] is not None]
    floors = [row["over_floor"] for row in layers if row["over_floor"] is not None]
    return [
        count(len(layers)),
        count(max(row["forwards"] for row in layers)),
        _span([times(floor) for floor in (min(floors), max(floors))]) if floors else NONE,
        _span([f"{r:.2f}×" for r in (min(ratios), max(ratios))]) if beyond else _same(ratios),
        NONE
        if costliest is None or costliest["over_balanced"] <= 1
        else f"{costliest['layer']} (+{100 * (costliest['over_balanced'] - 1):.1f} %)",
    ]


def _differs(row: Row) -> bool:
    ratio, noise = row["over_balanced"], row["noise"]
    return ratio is not None and noise is not None and abs(ratio - 1) > noise


def _same(ratios: list[float]) -> str:
    return "≈" if ratios else NONE


def _span(ends: list[str]) -> str:
    least, most = ends
    return least if least == most else f"{least.removesuffix('×')}–{most}"
