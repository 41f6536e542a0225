"""What `moe-lens counterfactual` prints: what experts are worth, and whether routes were right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moe_lens.metrics.counterfactual import (
    BEYOND,
    HIGH,
    Columns,
    Slice,
    expert_importance,
    route_changes,
    route_regret,
)
from moe_lens.numbers import NONE, count, counted, decimal, percent
from moe_lens.terminal.grid import add_numbers, add_row, notes, table
from moe_lens.terminal.plain import print_plain

_SLICES: tuple[Slice, ...] = ("margin", "entropy", "tag")


def print_counterfactual(
    console: Console, about: dict[str, Any], columns: Columns, path: str, experts: int = 8
) -> None:
    """Print a result.

    Args:
        console: Where to.
        about: What it says of itself.
        columns: Its rows.
        path: Of its file.
        experts: How many of a layer are listed, those first that cost most to lose.
    """
    title = (
        f"{about['model']}: {counted(about['measured_tokens'], 'token')} of "
        f"{counted(about['sequences'], 'sequence')}"
    )
    partly = " (interrupted: partial)" if about["interrupted"] else ""
    print_plain(console, "", Text(title, style="bold"))
    print_plain(console, Text.assemble(("result  ", "dim"), path, partly), whole=True)
    for name, part in (
        ("Route regret: other sets of as many experts, one token at a time", _regret(columns)),
        ("Experts", _experts(columns, about, experts)),
        ("Runner-up and top-k, all tokens at once", _changes(columns)),
    ):
        if part is not None:
            print_plain(console, "", Text(name, style="bold"), Padding.indent(part, 2))
    for says, why in about["refused"].items():
        print_plain(console, Text(f"not measured: {says}: {why}", style="yellow"))


def _regret(columns: Columns) -> RenderableType | None:
    made = table("layer", "tokens")
    add_numbers(made, "n", "regret", "± error", "> 0")
    add_numbers(made, "of a drawn\nroute", "mean\nroute")
    add_numbers(made, "rank", "of", "beats\ndrawn")
    found = route_regret(columns)
    if found.empty:
        return None
    slices = [route_regret(columns, by, together=True) for by in _SLICES]
    for part in (found, *(s for s in slices if len(s) > 1)):
        for row in part.to_dict("records"):
            layer = "all" if row["layer"] < 0 else str(row["layer"])
            add_row(
                made, layer, str(row["slice"]), count(row["tokens"]),
                _cost(row["regret"]), decimal(row["regret_error"], 4), percent(row["positive"]),
                _cost(row["random_regret"]), _cost(row["mean_route"]), decimal(row["rank"], 1),
                decimal(row["routes"] + 1, 0), percent(row["beats"]),
            )  # fmt: skip
    said = notes(
        "regret: loss minus the least loss of the drawn routes; a least of several flatters, so "
        "beside it that of a drawn route against the others. mean route: their mean loss minus the "
        "router's. rank: of the router's own route among all, 1 is best. beats drawn: share of "
        "drawn routes that are worse, 50 % of a router that draws. margin, entropy: quarters of "
        "each layer's tokens, the least first."
    )
    return Group(made, said)


def _experts(columns: Columns, about: dict[str, Any], most: int) -> RenderableType | None:
    found = expert_importance(columns, about["moe_layers"])
    if found.empty:
        return None
    made = table("layer", "expert")
    add_numbers(made, "load", "load\nrank")
    add_numbers(made, "knocked out", "± error", "where\nused")
    add_numbers(made, "forced in")
    made.add_column("", no_wrap=True)
    left = 0
    for layer, part in found.groupby("layer"):
        part = part.assign(load_rank=part.load.rank(ascending=False, method="min"))
        part = part.sort_values("knock_out", ascending=False)
        shown = part[(part.knock_out.rank(ascending=False) <= most) | part.dormant_but_causal]
        left += len(part) - len(shown)
        for row in shown.to_dict("records"):
            add_row(made, str(layer), str(row["expert"]), *_expert_cells(row))
    said = (
        f"load: share of tokens that choose it. knocked out: the router takes its best others; "
        "mean over all tokens, and over those that chose it. forced in: in the last place of all "
        f"others. dormant: below a quarter of a fair share; causal: where used, or forced in, "
        f"above {HIGH:g} times its layer's median, and beyond {BEYOND:g} errors."
    )
    return Group(made, notes(said, f"{counted(left, 'expert')} not listed." if left else ""))


def _expert_cells(row: Mapping[Any, Any]) -> list[str | Text]:
    causal = row["dormant_but_causal"]
    word = "dormant but causal" if causal else "dormant" if row["dormant"] else ""
    return [
        percent(row["load"]),
        decimal(row["load_rank"], 0),
        _cost(row["knock_out"]),
        decimal(row["knock_out_error"], 4),
        _cost(row["knock_out_used"]),
        _cost(row["force_in"]),
        Text(word, style="bold yellow" if causal else "dim"),
    ]


def _changes(columns: Columns) -> RenderableType | None:
    found = route_changes(columns)
    if found.empty:
        return None
    made = table("layer", "change")
    add_numbers(made, "loss", "cost", "± error", "tokens\nworse")
    for row in found.to_dict("records"):
        name = "runner-up last" if row["intervention"] == "runner_up" else f"top-{row['number']}"
        add_row(
            made, str(row["layer"]), name, decimal(row["loss"], 4), _cost(row["cost"]),
            decimal(row["cost_error"], 4), percent(row["worse"]),
        )  # fmt: skip
    return made


def _cost(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:+.4f}" if value else "0"
