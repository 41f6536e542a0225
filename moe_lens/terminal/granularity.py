"""What the granularity laboratory found, as tables."""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.numbers import NONE, count, decimal
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

Records = list[dict[str, Any]]
_INDENT = 2


def print_lab(
    console: Console, tables: dict[str, Records], about: dict[str, Any], source: str
) -> None:
    """Print all tables.

    Args:
        console: Where to.
        tables: `gap`, `sweeps`, `regions`, `configurations`.
        about: Preset, kind, hidden, seed, steps, batch.
        source: Of the author's numbers; empty: there are none of this setting.
    """
    said = (
        f"{about['kind']} experts, hidden size {about['hidden']}, seed {about['seed']}, "
        f"{count(about['steps'])} steps of {count(about['batch'])} new tokens"
    )
    print_plain(console, "", Text(said, style="dim"))
    author = bool(source)
    _print(console, "Students of equal active parameters", _gap(tables["gap"], author))
    _note(
        console,
        "error: squared, over that of predicting zero; FVU: over that of predicting the mean. "
        "affine: the best affine map. sets: different sets of experts that "
        f"{count(tables['gap'][0]['sets_tokens'])} tokens chose, of those that there are.",
        f"author: {source}." if author else "",
    )
    if tables["sweeps"]:
        _print(console, "The same k, in larger layers", _sweeps(tables["sweeps"], author))
    _print(console, "Regions of a plane, one for each set of experts", _regions(tables["regions"]))
    _note(
        console,
        "circle: arcs of the unit circle, of routers without a bias. square: one that holds "
        "nearly all normal inputs, with a bias. plane: such a square of a plane through the inputs "
        "of what was trained. Counted exactly, where scores cross; a picture may miss the "
        "smallest.",
    )
    _print(console, "Sets that random routers reach", _configurations(tables["configurations"]))
    _note(
        console,
        f"sets: different ones that {count(tables['configurations'][0]['tokens'])} normal inputs "
        "of d dimensions chose. at least: Chao's estimate of all they would. coverage: the "
        "probability that the next input's set is one of these (Good-Turing).",
    )
    print_plain(console, "")


def _print(console: Console, title: str, made: RenderableType) -> None:
    print_plain(console, "", Text(title, style="bold"), Padding.indent(made, _INDENT))


def _note(console: Console, *texts: str) -> None:
    print_plain(console, Padding.indent(notes(*texts), _INDENT))


def _gap(records: Records, author: bool) -> RenderableType:
    made = table("teacher", "student")
    add_numbers(made, "width", "error", "affine", "zero", "FVU", "sets", "possible", "s")
    if author:
        add_numbers(made, "author")
    for row in records:
        cells = [
            row["teacher"],
            row["student"],
            count(row["width"]),
            _error(row["nmse"]),
            _error(row["affine_nmse"]),
            "1",
            _error(row["fvu"]),
            count(row["sets_used"]),
            _many(row["possible"]),
            decimal(row["seconds"], 1),
        ]
        add_row(made, *cells, *([_error(row["published"])] if author else []))
    return made


def _sweeps(records: Records, author: bool) -> RenderableType:
    made = table("larger", "student")
    add_numbers(made, "times", "width", "error", "affine", "zero", "sets", "possible", "s")
    if author:
        add_numbers(made, "author")
    for row in records:
        cells = [
            row["swept"],
            row["student"],
            f"{row['factor']:g}",
            count(row["width"]),
            _error(row["nmse"]),
            _error(row["affine_nmse"]),
            "1",
            count(row["sets_used"]),
            _many(row["possible"]),
            decimal(row["seconds"], 1),
        ]
        add_row(made, *cells, *([_error(row["published"])] if author else []))
    return made


def _regions(records: Records) -> RenderableType:
    made = table("where", "router")
    add_numbers(made, "experts", "k", "regions", "median", "possible")
    keys = ("where", "router", "experts", "top_k")
    for key, of in groupby(records, key=lambda row: tuple(row[name] for name in keys)):
        same = list(of)
        found = sorted(row["regions"] for row in same)
        span = count(found[0]) + ("" if found[0] == found[-1] else f"–{count(found[-1])}")
        where, router, experts, top_k = key
        add_row(made, where, f"{len(same)} {router}" if len(same) > 1 else router, count(experts),
                count(top_k), span, count(median(found)),
                _many(2.0 ** same[0]["possible_bits"]))  # fmt: skip
    return made


def _configurations(records: Records) -> RenderableType:
    made = table("router")
    add_numbers(made, "d", "sets", "at least", "coverage", "possible")
    for row in records:
        add_row(made, f"{row['experts']}e{row['top_k']}a", count(row["hidden"]), count(row["used"]),
                count(row["at_least"]), decimal(row["coverage"], 4),
                _many(row["possible"]))  # fmt: skip
    return made


def _error(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3f}" if value >= 0.0995 else f"{value:.2g}"


def _many(value: float) -> str:
    return count(round(value)) if value < 1e7 else f"{value:.1e}"
