"""What `moe-lens precision` prints: what rounding does to routes, to the loss, to the weights."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.metrics.precision import (
    Columns,
    flips_by_margin,
    layer_errors,
    loss_split,
    routing_agreement,
    weight_errors,
)
from moe_lens.numbers import NONE, counted, decimal, digits, percent
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

_BUCKETS = 4


def print_precision(console: Console, about: dict[str, Any], columns: Columns, path: str) -> None:
    """Print a result.

    Args:
        console: Where to.
        about: What it says of itself.
        columns: Its rows.
        path: Of its file.
    """
    title = (
        f"{about['model']}: {counted(about['measured_tokens'], 'token')} of "
        f"{counted(about['sequences'], 'sequence')}"
    )
    partly = " (interrupted: partial)" if about["interrupted"] else ""
    print_plain(console, "", Text(title, style="bold"))
    print_plain(console, Text.assemble(("result  ", "dim"), path, partly), whole=True)
    for name, part in (
        ("Loss, weights of all layers rounded", _losses(columns)),
        ("Routes: experts chosen as before", _routes(columns)),
        ("Routes by layer", _layers(columns)),
        ("Tokens with other experts, by the router's margin; one layer rounded", _flips(columns)),
        ("Weights", _weights(columns)),
    ):
        if part is not None:
            print_plain(console, "", Text(name, style="bold"), Padding.indent(part, 2))
    for why in about["refused"].values():
        print_plain(console, Text(f"left out: {why}", style="yellow"))


def _losses(columns: Columns) -> RenderableType | None:
    found = loss_split(columns)
    if found.empty:
        return None
    made = table("format", "rounded")
    add_numbers(made, "loss", "cost", "± error")
    add_numbers(made, "arithmetic", "± error", "routing", "± error")
    for row in found.to_dict("records"):
        cells = [decimal(row["loss"], 4)]
        for name in ("total", "arithmetic", "routing"):
            cells += [_cost(row[name]), decimal(row[f"{name}_error"], 4)]
        add_row(made, row["format"], row["part"], *cells)
    return Group(
        made,
        notes(
            "arithmetic: each layer is given the experts that it chose before. routing: what is "
            "left of the cost when it chooses by itself."
        ),
    )


def _routes(columns: Columns) -> RenderableType | None:
    found = routing_agreement(columns)
    if found.empty:
        return None
    made = table("format", "rounded")
    add_numbers(made, "one\nlayer", "tokens\nflipped", "KL")
    add_numbers(made, "all,\nforced")
    add_numbers(made, "all,\nfree", "tokens\nflipped", "KL", "last\nlayer")
    for (name, part), of in found.groupby(["format", "part"], sort=False):
        alone, forced, free = (of[of["mode"] == m] for m in ("alone", "forced", "free"))
        add_row(
            made, str(name), str(part),
            percent(alone.agreement.mean()), percent(alone.flipped.mean()), digits(alone.kl.mean()),
            percent(forced.agreement.mean()), percent(free.agreement.mean()),
            percent(free.flipped.mean()), digits(free.kl.mean()),
            percent(_last(free)),
        )  # fmt: skip
    said = notes(
        "Means over layers. one layer: it alone is rounded, what comes before it as it was. "
        "forced: what routers would choose while all get the experts chosen before. free: as they "
        "route."
    )
    return Group(made, said)


def _last(free: pd.DataFrame) -> float:
    return float(free.sort_values("layer").agreement.iloc[-1]) if len(free) else float("nan")


def _layers(columns: Columns) -> RenderableType | None:
    """Of the last part that was measured: of both, unless that was not asked."""
    found = routing_agreement(columns)
    if found.empty or found.layer.nunique() < 2:
        return None
    part = found.part.iloc[-1]
    found = found[found.part == part]
    formats = list(found.format.unique())
    made = table("layer")
    for name in formats:
        add_numbers(made, f"{name}\nalone", f"{name}\nfree")
    cells = found.set_index(["layer", "format", "mode"]).agreement
    for layer in sorted(found.layer.unique()):
        shares = [cells.get((layer, n, m)) for n in formats for m in ("alone", "free")]
        add_row(made, str(layer), *(percent(x) for x in shares))
    return Group(made, notes(f"Rounded: {part}."))


def _flips(columns: Columns) -> RenderableType | None:
    found = flips_by_margin(columns, buckets=_BUCKETS)
    found = found[found.part != "experts"]  # which alone leave their own router as it is
    if found.empty:
        return None
    made = table("format", "rounded")
    add_numbers(made, "least\nsure", *map(str, range(2, _BUCKETS)), "most\nsure")
    for (name, part), of in found.groupby(["format", "part"], sort=False):
        share = of.set_index("bucket").flipped
        add_row(made, str(name), str(part), *(percent(share.get(i + 1)) for i in range(_BUCKETS)))
    return Group(made, notes("Quarters of each layer's tokens."))


def _weights(columns: Columns) -> RenderableType | None:
    found = weight_errors(columns)
    if found.empty:
        return None
    layers = layer_errors(columns)
    made = table("format")
    add_numbers(made, "routers", "experts", "by usage", "outlier")
    add_numbers(made, "worst", "its error", "its usage")
    for name, of in found.groupby("format", sort=False):
        experts = of[of.part == "experts"]
        here = layers[layers.format == name]
        cells = [digits(of[of.part == "router"].error.mean()) or NONE]
        if len(experts):
            worst = experts.sort_values("weighted").iloc[-1]
            cells += [
                digits(experts.error.mean()), digits(here.used_error.mean()),
                decimal(experts.outlier.max(), 1),
                f"layer {worst.layer}, {worst.expert:.0f}", digits(worst.error),
                percent(worst.usage),
            ]  # fmt: skip
        add_row(made, str(name), *cells)
    said = notes(
        "Squared change by squared size, mean over layers. by usage: mean over choices. outlier: "
        "largest weight by standard deviation. worst: the highest error x usage of an expert."
    )
    return Group(made, said)


def _cost(value: float) -> str:
    return f"{value:+.4f}" if value else "0"
