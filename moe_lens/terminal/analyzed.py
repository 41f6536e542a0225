"""Routing metrics: a row a metric, beside chance; a column a layer, or what many layers span."""

from __future__ import annotations

import math
import statistics
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.numbers import count, digits, percent
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

Said = dict[str, Any]

_INDENT = 2
_NAME, _CELL = 24, 19
"""Columns that a name, and a layer, take."""
_MARKS = {"high": "▲", "low": "▼", "": " "}
_EXPLAINED = (
    "chance: as docs/metrics.md says for each metric: a router that draws experts uniformly, with "
    "as many tokens and choices, independent of each other; the recorded choices with tags, ids or "
    "tokens permuted; or one value. ▲ ▼: beyond all draws (999 of a layer, 199 of its forwards, "
    "199 permutations). With many tokens small differences are beyond chance too: look at the size."
)
_SPANNED = (
    "Of all layers together; chance: the median of theirs. A layer alone, beside its own chance: "
    "--layers 0, or 0-2."
)


def print_phase(console: Console, phase: Said) -> None:
    """Print what was found of a phase, its answer first.

    Args:
        console: Where to.
        phase: `answer`, `catalogue` (name, group, unit, level), `layers` (layer, tokens, of which
            looked_at one by one, metrics by name), `paths` (stream, answer) and `lacking` (what,
            which metrics and layers), as `commands.analyze` makes them.
    """
    print_plain(console, Text(phase["answer"], style="bold"))
    few = len(phase["layers"]) <= max(1, (console.width - _NAME - _INDENT) // _CELL)
    for group in dict.fromkeys(m["group"] for m in phase["catalogue"]):
        rows = [m for m in phase["catalogue"] if m["group"] == group and _has(phase, m["name"])]
        if rows:
            made = _table(rows, phase["layers"]) if few else _spans(rows, phase["layers"])
            print_plain(console, "", Text(group, style="bold"), Padding.indent(made, _INDENT))
    for each in phase["paths"]:
        print_plain(console, "", Text("paths", style="bold"))
        print_plain(console, Padding.indent(Text(f"{each['stream']}: {each['answer']}"), _INDENT))
    if phase["lacking"]:
        print_plain(console, "", Text("not computed", style="bold"))
        print_plain(console, Padding.indent(_lacking(phase), _INDENT))
    print_plain(console, notes(*_sampled(phase), *([] if few else [_SPANNED]), _EXPLAINED), "")


def _sampled(phase: Said) -> list[str]:
    """Of how many tokens the metrics of single tokens are, where some were."""
    seen = [(x["looked_at"], x["tokens"]) for x in phase["layers"] if x["looked_at"]]
    if not seen:
        return []
    looked, tokens = min(seen)
    names = [m["name"] for m in phase["catalogue"] if m["level"] != "C"]
    whole = f" ({percent(looked / tokens)} of {count(tokens)})" if tokens else ""
    which = names[0] if len(names) == 1 else f"The {count(len(names))} metrics of single tokens"
    return [f"{which}: of {count(looked)} tokens{whole}, whole sequences drawn evenly."]


def _table(rows: list[Said], layers: list[Said]) -> RenderableType:
    made = table("metric")
    for each in layers:
        add_numbers(made, f"layer {each['layer']}", "chance")
    for metric in rows:
        cells = [x["metrics"][metric["name"]] for x in layers]
        add_row(made, metric["name"], *(text for cell in cells for text in _cells(cell)))
    return made


def _cells(cell: Said) -> tuple[str, str]:
    if cell["lacks"]:
        return "–  ", ""
    return f"{digits(cell['value'])} {_MARKS[cell['beyond']]}", digits(cell["chance"])


def _spans(rows: list[Said], layers: list[Said]) -> RenderableType:
    """Where there are more layers than columns: the lowest, the median, the highest."""
    made = table("metric")
    add_numbers(made, "lowest", "layer", "median", "highest", "layer")
    add_numbers(made, "chance", "beyond it")
    for metric in rows:
        cells = [
            (x["layer"], cell)
            for x in layers
            if not (cell := x["metrics"][metric["name"]])["lacks"]
        ]
        values = [(cell["value"], layer) for layer, cell in cells]
        chances = [
            c for _, cell in cells if (c := cell["chance"]) is not None and not math.isnan(c)
        ]
        (lowest, at_lowest), (highest, at_highest) = min(values), max(values)
        places = ("", "") if lowest == highest else (str(at_lowest), str(at_highest))
        add_row(
            made, metric["name"], digits(lowest), places[0],
            digits(statistics.median(v for v, _ in values)), digits(highest), places[1],
            digits(statistics.median(chances)) if chances else "", _beyond([c for _, c in cells]),
        )  # fmt: skip
    return made


def _beyond(cells: list[Said]) -> str:
    """How many layers are beyond chance, where that was drawn."""
    if all(cell["chance_high"] is None for cell in cells):
        return ""
    marks = [mark for cell in cells if (mark := _MARKS[cell["beyond"]]).strip()]
    counted = [f"{marks.count(mark)} {mark}" for mark in ("▲", "▼") if mark in marks]
    return f"{', '.join(counted) or '0'} of {len(cells)}"


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
