"""The memory that experts need: hit rates by cache size and by layer, conversations, tags."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.numbers import count, counted, decimal, percent
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

Row = dict[str, Any]

_INDENT = 2
_POLICIES = ("lru", "lfu", "static", "static_hindsight", "optimum", "chance")
_HEADS = ("LRU", "LFU", "static", "static\nhindsight", "optimum", "chance")


def print_phase(console: Console, phase: Row) -> None:
    """Print what was found of a phase, answers first.

    Args:
        console: Where to.
        phase: `phase`, `answers` (sentences), `unit`, `size`, `tokens`, `sequences`, `sizes`,
            `layers` and `tags` (rows, as `moe_lens.metrics.summary` makes them), `not_measured`
            (layers).
    """
    print_plain(console, *(Text(answer, style="bold") for answer in phase["answers"]))
    title = (
        f"{phase['phase']}: up to {counted(phase['tokens'], 'token')} of "
        f"{counted(phase['sequences'], 'sequence')} a layer"
    )
    print_plain(console, "", Text(title, style="bold"))
    if phase["sizes"]:
        _section(console, "Hit rate by experts resident per layer", _sizes(phase["sizes"], phase))
    title = f"Hit rate by layer, {phase['size']} resident"
    _section(console, title, _layers(phase["layers"], phase["unit"]))
    _section(console, "Conversations and prefetch by layer", _conversations(phase["layers"]))
    if phase["tags"]:
        title = f"Experts touched by a batch of {phase['tags'][0]['batch']}, mean over layers"
        _section(console, title, _tags(phase["tags"]))
    print_plain(console, Padding.indent(notes(*_explained(phase)), _INDENT), "")


def _section(console: Console, title: str, body: RenderableType) -> None:
    print_plain(console, Group("", Padding.indent(Text(title), _INDENT)))
    print_plain(console, Padding.indent(body, 2 * _INDENT))


def _sizes(rows: list[Row], phase: Row) -> RenderableType:
    made = table("experts")
    scale, unit = _unit(rows, "stall_lru_s")
    add_numbers(made, *_HEADS)
    add_numbers(made, f"LRU waits\n{unit}/{phase['unit']}", "optimum\nwaits")
    for row in rows:
        add_row(
            made,
            f"{row['size']}/{row['experts']}",
            *(percent(row[name]) for name in _POLICIES),
            decimal(row["stall_lru_s"] * scale),
            decimal(row["stall_optimum_s"] * scale),
            style="bold" if row["size"] == phase["size"] else "",
        )
    return made


def _layers(rows: list[Row], of: str) -> RenderableType:
    made = table("layer")
    scale, unit = _unit(rows, "stall_lru_s")
    add_numbers(made, "experts")
    add_numbers(made, *_HEADS)
    add_numbers(made, f"LRU waits\n{unit}/{of}")
    for row in rows:
        add_row(
            made,
            str(row["layer"]),
            f"{row['size']}/{row['experts']}",
            *(percent(row[name]) for name in _POLICIES),
            decimal(row["stall_lru_s"] * scale),
        )
    return made


def _conversations(rows: list[Row]) -> RenderableType:
    made = table("layer")
    add_numbers(made, "touched", "by\nchance", "for\n90 %", "95 %", "99 %")
    add_numbers(made, "experts\nfetched", "popu-\nlarity", "prefix", "last\nlayer", "chance")
    for row in rows:
        add_row(
            made,
            str(row["layer"]),
            *(decimal(row[name], 1) for name in (
                "touched", "touched_chance", "needed_90", "needed_95", "needed_99")),
            str(row["fetched"]),
            *(percent(row[f"recall_{name}"]) for name in (
                "popularity", "prefix", "last_layer", "chance")),
        )  # fmt: skip
    return made


def _tags(rows: list[Row]) -> RenderableType:
    made = table("tag")
    add_numbers(made, "sequences", "grouped", "mixed", "by\nchance", "grouped/\nmixed",
                "tags at\nrandom")  # fmt: skip
    for row in rows:
        null = f"{decimal(row['null_low'])}–{decimal(row['null_high'])}"
        add_row(
            made,
            row["tag"],
            count(row["sequences"]),
            *(decimal(row[name], 1) for name in ("grouped", "mixed", "chance")),
            decimal(row["ratio"], 3),
            "" if math.isnan(row["null_low"]) else null,
        )
    return made


def _unit(rows: list[Row], name: str) -> tuple[float, str]:
    """Milliseconds, or microseconds where nothing takes a tenth of one."""
    return (1e6, "µs") if max(row[name] for row in rows) < 1e-4 else (1e3, "ms")


def _explained(phase: Row) -> list[str]:
    unit, missing = phase["unit"], phase["not_measured"]
    texts = [
        f"What a {unit} needs must be resident while it runs. static keeps what was most popular "
        "in the first half, hindsight in the half that is counted; the optimum knows the future. "
        "touched: distinct experts of a sequence; for 90 %: the fewest that take that share of its "
        "choices. fetched: recall of so many experts, named by popularity (first half), by the "
        "sequence's earlier tokens, by the token's experts in the last layer."
    ]
    if missing:
        texts.append(
            f"Not measured: layer{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}; "
            f"experts choose tokens there, or fewer than two {unit}s were kept."
        )
    return texts
