"""What a replay measured: times beside floor and twins, what ran, and who was hot."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_lens.numbers import NONE, count, decimal, percent, times
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

Row = dict[str, Any]

_INDENT = 2
_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
_HOT = 3


def print_replay(
    console: Console, about: Row, layers: list[Row], answers: list[str], path: str
) -> None:
    """Print a replay.

    Args:
        console: Where to.
        about: What the result says of itself.
        layers: A row for each phase and layer.
        answers: What the routing costs, in sentences.
        path: Of the result's file.
    """
    print_plain(console, Padding.indent(_heading(about, path), _INDENT))
    for phase in dict.fromkeys(row["phase"] for row in layers):
        mine = [row for row in layers if row["phase"] == phase]
        forwards = max(row["forwards"] for row in mine)
        title = f"{phase}: {count(forwards)} forward{'s' if forwards != 1 else ''} a layer"
        print_plain(
            console,
            Group("", Text(title, style="bold")),
            Padding.indent(_times(mine), _INDENT),
            "",
            Padding.indent(_ran(mine, about), _INDENT),
        )
        if any(row["stages_ns"] for row in mine):
            print_plain(console, "", Padding.indent(_stages(mine), _INDENT))
        hot = [row for row in about["attributed"] if row["phase"] == phase and row["experts"]]
        if hot:
            print_plain(console, "", Padding.indent(_hot(hot), _INDENT))
    print_plain(console, Padding.indent(notes(*_explained(about)), _INDENT), "")
    for answer in answers:
        print_plain(console, Text(answer, style="bold"))


def _heading(about: Row, path: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    facts = {
        "replayed": _forwards(about),
        "policy": _policy(about),
        "layer": _shapes(about),
        "weights": f"experts: random; gate: {about['weights']}",
        "on": f"{about['device_name']}: {_backends(about['backends'])}",
        "measured": f"{about['clock']}; median of {about['repeats']} repeats",
        "floors": f"{_ceilings(about)}, {about['ceilings_from']}",
        "result": path if about["state"] == "complete" else f"{path} (interrupted: partial)",
    }
    for label, text in facts.items():
        add_row(grid, label, text)
    return grid


def _forwards(about: Row) -> str:
    of, layers = about["forwards"], about["layers"]
    text = f"{count(of['replayed'])} of {count(of['in_trace'])} forwards"
    if of["with_rows"] < of["in_trace"]:
        text += f", {count(of['with_rows'])} of which have per-token rows"
    if of["partial"] and of["partial_used"]:
        text += f"; {count(of['partial'])} lack some tokens' rows and count as smaller batches"
    elif of["partial"]:
        text += f"; {count(of['partial'])} lack some tokens' rows and are left out"
    end = "time was up" if about["state"] == "complete" else "it was interrupted"
    if of["replayed"] < of["chosen"]:
        text += f"; {end} before the other {count(of['chosen'] - of['replayed'])} chosen"
    for phase, missing in layers["missing"].items():
        text += f"; {end} before a forward of {phase} ran in layer {', '.join(map(str, missing))}"
    if about["padding_rows"]:
        text += f"; {count(about['padding_rows'])} rows of padding left out"
    return text


def _policy(about: Row) -> str:
    policy = about["policy"]
    text = str(policy["name"])
    if policy["name"] == "recorded":
        text += ": what was dropped when it was recorded stays dropped"
    if policy["capacity_factor"] is not None:
        text += f", capacity factor {policy['capacity_factor']:g}, by {policy['by']}"
    if policy["top_k"] is not None:
        again = "weights sum to 1 again" if about["renormalised"] else "weights as they were"
        text += f"; top-{policy['top_k']} of the largest weights, {again}"
    return text


def _shapes(about: Row) -> str:
    kinds = dict.fromkeys(
        (s["experts"], s["top_k"], s["hidden"], s["intermediate"], s["dtype"])
        for s in about["shapes"]
    )
    text = "; ".join(
        f"{e} experts{'' if k is None else f', top-{k}'}, hidden {d:,}, intermediate {f:,}, {dtype}"
        for e, k, d, f, dtype in kinds
    )
    preset = about["preset"]
    sizes = {k[2:4] for k in kinds}
    if preset is None or sizes != {(preset["hidden"], preset["intermediate"])}:
        return text  # given sizes come before the preset's
    text += f" (sizes of {preset['name']}"
    if any(k[:2] != (preset["experts"], preset["top_k"]) for k in kinds):
        text += (
            f", which has {preset['experts']} experts, top-{preset['top_k']}: this is the trace's "
            "routing at that size"
        )
    return f"{text})"


def _backends(backends: dict[str, str]) -> str:
    return "; ".join(f"{name}, {why}" for name, why in backends.items())


def _ceilings(about: Row) -> str:
    dtype = about["shapes"][0]["dtype"]
    rates = about["ceilings"]
    flop, flops = _rate(rates["matmul_flop_per_s"][dtype], "FLOP/s")
    size, sizes = _rate(rates["copy_bytes_per_s"], "B/s")
    return f"{flop} {flops} {dtype}, {size} {sizes}"


def _times(rows: list[Row]) -> RenderableType:
    scale, unit = _unit(max(row["p99_ns"] for row in rows))
    made = table("layer")
    add_numbers(made, f"p50\n{unit}", "p90", "p99", "floor", "time/\nfloor")
    add_numbers(made, "balanced\ntwin", "time/\ntwin", "same\ntouched", "time/\ntwin", "A/A\nnoise")
    for row in rows:
        add_row(
            made,
            str(row["layer"]),
            *(_digits(row[name] / scale) for name in ("p50_ns", "p90_ns", "p99_ns", "floor_ns")),
            times(row["over_floor"]),
            _digits(row["balanced_ns"] / scale),
            _beside(row["over_balanced"], row["noise"]),
            _digits(row["same_touched_ns"] / scale),
            _beside(row["over_same_touched"], row["noise"]),
            percent(row["noise"]),
        )
    return made


def _ran(rows: list[Row], about: Row) -> RenderableType:
    experts = {s["layer"]: s["experts"] for s in about["shapes"]}
    flop = _rate(max(row["flop_per_s"] for row in rows), "FLOP/s")[1]
    size = _rate(max(row["bytes_per_s"] for row in rows), "B/s")[1]
    made = table("layer")
    add_numbers(made, "tokens", "touched\nexperts", "tokens/expert\nmin/median/max")
    add_numbers(made, "padded\nrows", "drop-\nped", "re-\nrouted")
    add_numbers(made, flop, size)
    for row in rows:
        add_row(
            made,
            str(row["layer"]),
            count(row["tokens"]),
            f"{row['touched']:g}/{experts[row['layer']]}",
            f"{row['rows_min']:,}/{row['rows_median']:g}/{row['rows_max']:,}",
            times(1 + row["padded_share"]),
            percent(row["dropped"] / row["slots"] if row["slots"] else None),
            percent(row["rerouted"] / row["slots"] if row["slots"] else None),
            _in(row["flop_per_s"], flop),
            _in(row["bytes_per_s"], size),
        )
    return made


def _stages(rows: list[Row]) -> RenderableType:
    names = list(rows[0]["stages_ns"] or {})
    scale, unit = _unit(max(t for row in rows for t in (row["stages_ns"] or {"": 1.0}).values()))
    made = table("layer")
    add_numbers(made, *(f"{name}\n{unit}" for name in names))
    for row in rows:
        of = row["stages_ns"] or {}
        cells = (_digits(of[name] / scale) if name in of else NONE for name in names)
        add_row(made, str(row["layer"]), *cells)
    return made


def _hot(rows: list[Row]) -> RenderableType:
    made = table("layer", "hottest experts, and their share of its time (attributed)")
    for row in rows:
        hottest = ", ".join(f"{e['expert']}: {percent(e['share'])}" for e in row["experts"][:_HOT])
        add_row(made, str(row["layer"]), hottest)
    return made


def _explained(about: Row) -> list[str]:
    texts = [
        "p50, p90, p99 are over forwards, the rest are medians or sums over them. floor: no fused "
        "layer can be faster on these ceilings. balanced twin: as many rows, over all experts; "
        "same touched: over the experts that this routing touches. ≈: no difference above the A/A "
        "noise, which is what one and the same work differs by. padded rows: the rows of whole "
        f"tiles of {about['tile']} over those there are."
    ]
    sums = [c["sum_ns"] / c["layer_ns"] for c in about["curves"] if c["layer_ns"]]
    if sums:
        ratios = ", ".join(decimal(ratio) for ratio in sums)
        texts.append(
            "Attributed by what one expert alone takes; summed over the experts of a layer that "
            f"was measured beside it, this is {ratios} of the layer's time."
        )
    return texts


def _beside(ratio: float, noise: float) -> str:
    if math.isnan(ratio):
        return NONE
    return "≈" if abs(ratio - 1) <= noise else f"{ratio:.2f}×"


def _unit(ns: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in _UNITS if ns >= scale), _UNITS[-1])


def _digits(value: float) -> str:
    """Three digits that mean something."""
    return decimal(value, 0 if value >= 100 else 1 if value >= 10 else 2)


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def _rate(value: float, unit: str) -> tuple[str, str]:
    scale, prefix = next((p for p in _PREFIXES if value >= p[0]), _PREFIXES[-1])
    return _digits(value / scale), prefix + unit


def _in(value: float, unit: str) -> str:
    scale = next(scale for scale, prefix in _PREFIXES if unit.startswith(prefix))
    return _digits(value / scale)
