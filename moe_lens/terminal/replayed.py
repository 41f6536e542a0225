"""What a replay measured: times beside floor and twins, what ran, and who was hot."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_lens.lacking import made_up
from moe_lens.numbers import NONE, count, counted, decimal, percent, times
from moe_lens.replay.summary import P90_FROM, P99_FROM
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain
from moe_lens.terminal.units import digits, in_unit, rate, unit_of

Row = dict[str, Any]

_INDENT = 2
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
    print_plain(console, Padding.indent(_heading(about), _INDENT))
    interrupted = "" if about["state"] == "complete" else " (interrupted: partial)"
    label = f"{' ' * _INDENT}{'result':10}"
    print_plain(console, Text.assemble((label, "dim"), path, interrupted), whole=True)
    for phase in dict.fromkeys(row["phase"] for row in layers):
        mine = [row for row in layers if row["phase"] == phase]
        forwards = max(row["forwards"] for row in mine)
        title = f"{phase}: {counted(forwards, 'forward')} a layer"
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
    print_plain(console, Padding.indent(notes(*_explained(about, layers)), _INDENT), "")
    for text in _beaten(about):
        print_plain(console, Text(text, style="bold yellow"), "")
    for answer in answers:
        print_plain(console, Text(answer, style="bold"))


def _heading(about: Row) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    facts = {
        "replayed": _forwards(about),
        "policy": policy_words(about),
        "layer": shape_words(about),
        "weights": f"experts: random; gate: {about['weights']}",
        "on": f"{about['device_name']}: {backend_words(about['backends'])}",
        "measured": f"{about['clock']}; median of {about['repeats']} repeats",
        "floors": f"{_ceilings(about)}, {about['ceilings_from']}",
    }
    for label, text in facts.items():
        add_row(grid, label, text)
    return grid


def _forwards(about: Row) -> str:
    of, layers = about["forwards"], about["layers"]
    text = f"{count(of['replayed'])} of {counted(of['in_trace'], 'forward')}"
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


def policy_words(about: Row) -> str:
    """What became of the router's choices."""
    policy = about["policy"]
    text = str(policy["name"])
    if policy["name"] == "recorded":
        text += (
            ": every choice; what was dropped is not known"
            if about.get("imported")
            else ": what was dropped when it was recorded stays dropped"
        )
    if policy["capacity_factor"] is not None:
        text += f", capacity factor {policy['capacity_factor']:g}, by {policy['by']}"
    if policy["top_k"] is not None:
        again = "weights sum to 1 again" if about["renormalised"] else "weights as they were"
        text += f"; top-{policy['top_k']} of the largest weights, {again}"
    return text


def shape_words(about: Row) -> str:
    """The layers' sizes, and a preset that they are of."""
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


def backend_words(backends: dict[str, str]) -> str:
    """What ran, and why."""
    return "; ".join(f"{name}, {why}" for name, why in backends.items())


def _ceilings(about: Row) -> str:
    dtype = about["shapes"][0]["dtype"]
    rates = about["ceilings"]
    flop, flops = rate(rates["matmul_flop_per_s"][dtype], "FLOP/s")
    size, sizes = rate(max(rates["copy_bytes_per_s"], rates["read_bytes_per_s"]), "B/s")
    return f"{flop} {flops} {dtype}, {size} {sizes}"


def _times(rows: list[Row]) -> RenderableType:
    scale, unit = unit_of(max(row["max_ns"] for row in rows))
    high = "p99_ns" if any(row["p99_ns"] is not None for row in rows) else "max_ns"
    shown = ("p50_ns", "p90_ns", high, "floor_ns")
    made = table("layer")
    add_numbers(made, f"p50\n{unit}", "p90", high[:3], "floor", "time/\nfloor")
    add_numbers(made, "balanced\ntwin", "time/\ntwin", "same\ntouched", "time/\ntwin", "A/A\nnoise")
    for row in rows:
        add_row(
            made,
            str(row["layer"]),
            *(NONE if row[name] is None else digits(row[name] / scale) for name in shown),
            times(row["over_floor"]),
            digits(row["balanced_ns"] / scale),
            _beside(row["over_balanced"], row["noise"]),
            digits(row["same_touched_ns"] / scale),
            _beside(row["over_same_touched"], row["noise"]),
            percent(row["noise"]),
        )
    return made


def _ran(rows: list[Row], about: Row) -> RenderableType:
    experts = {s["layer"]: s["experts"] for s in about["shapes"]}
    flop = rate(max(row["flop_per_s"] for row in rows), "FLOP/s")[1]
    size = rate(max(row["bytes_per_s"] for row in rows), "B/s")[1]
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
            in_unit(row["flop_per_s"], flop),
            in_unit(row["bytes_per_s"], size),
        )
    return made


def _stages(rows: list[Row]) -> RenderableType:
    names = list(rows[0]["stages_ns"] or {})
    scale, unit = unit_of(max(t for row in rows for t in (row["stages_ns"] or {"": 1.0}).values()))
    made = table("layer")
    add_numbers(made, *(f"{name}\n{unit}" for name in names))
    for row in rows:
        of = row["stages_ns"] or {}
        cells = (digits(of[name] / scale) if name in of else NONE for name in names)
        add_row(made, str(row["layer"]), *cells)
    return made


def _hot(rows: list[Row]) -> RenderableType:
    made = table("layer", "hottest experts, and their share of its time (attributed)")
    for row in rows:
        add_row(made, str(row["layer"]), _hottest(row["experts"]))
    return made


def _hottest(experts: list[Row]) -> str:
    """The first of them; those with one and the same share together."""
    texts, named = [], 0
    for share, group in groupby(experts, key=lambda e: e["share"]):
        if named >= _HOT:
            break
        alike = list(group)
        ids = [str(e["expert"]) for e in alike[: _HOT - named]]
        named += len(ids)
        others = alike[0]["alike"] + 1 - len(ids)
        each = " each" if alike[0]["alike"] else ""
        more = f" and {count(others)} more" if others else ""
        texts.append(f"{', '.join(ids)}{more}: {percent(share)}{each}")
    return "; ".join(texts)


def _explained(about: Row, layers: list[Row]) -> list[str]:
    texts = [
        "p50, floor and the twins: medians over forwards. time/floor, time/twin: all forwards "
        "together, so long ones count most; it is not p50 over the column beside it. floor: no "
        "fused layer can be faster on these ceilings. balanced twin: as many rows, over all "
        "experts; same touched: over the experts that this routing touches. ≈: no difference above "
        "the A/A noise, which is what one and the same work differs by. padded rows: the rows of "
        f"whole tiles of {about['tile']} over those there are."
    ]
    if any(row["p99_ns"] is None for row in layers):
        texts.insert(
            0,
            f"A p90 takes {P90_FROM} forwards and a p99 {P99_FROM}: of fewer it would be the "
            "slowest, which max is.",
        )
    sums = [c["sum_ns"] / c["layer_ns"] for c in about["curves"] if c["layer_ns"]]
    if sums:
        ratios = ", ".join(decimal(ratio) for ratio in sums)
        texts.append(
            "Attributed by what one expert alone takes; summed over the experts of a layer that "
            f"was measured beside it, this is {ratios} of the layer's time."
        )
    if about.get("made_steps"):
        texts.append(made_up(about["made_steps"]))
    return texts


def _beaten(about: Row) -> list[str]:
    """Ceilings that were measured too low, as this replay shows."""
    dtype = about["shapes"][0]["dtype"]
    words = {"matmul": f"the {dtype} rate", "memory": "the bandwidth"}
    texts = []
    for found in about["beaten"]:
        n, what = found["forwards"], found["what"]
        cached = " (or caches held the weights)" if what == "memory" else ""
        texts.append(
            f"{words[what]} that the floors are computed from was beaten in {count(n)} "
            f"forward{'s' if n != 1 else ''} of a layer, by up to {decimal(found['by'])}×: it was "
            f"measured too low{cached}. Measure again with moe-lens machine."
        )
    return [text[0].upper() + text[1:] for text in texts]


def _beside(ratio: float, noise: float) -> str:
    if math.isnan(ratio):
        return NONE
    return "≈" if abs(ratio - 1) <= noise else f"{ratio:.2f}×"
