"""How far routers choose as before when weights are rounded, layer by layer."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line, steps
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

_DASHES = {"alone": "dot", "free": "solid"}
_WORDS = {"alone": "this layer alone", "free": "all layers"}


def agreement_by_layer(table: pd.DataFrame) -> go.Figure:
    """Agreement over layers, a line a format: each layer alone, and all together.

    Args:
        table: `routing_agreement` of `moe_lens.metrics.precision`: `format`, `part`, `mode`,
            `layer`, `agreement`. Of several parts the last one is drawn.
    """
    table = one_run(table)
    if not known(table, "agreement"):
        return blank("Routes in low precision", "No rounded weights have been measured.")
    part = table["part"].iloc[-1]
    table = table[(table["part"] == part) & table["mode"].isin(list(_DASHES))].sort_values("layer")
    worst = table.iloc[int(numbers(table, "agreement").argmin())]
    made = figure(
        f"With {shown(worst['format'])}, layer {worst['layer']} keeps "
        f"{percent(float(worst['agreement']))} of its choices",
        f"Rounded: {_WHOSE.get(part, shown(part))}; dotted: one layer rounded, the others as "
        "they were",
    )
    for name, of in table.groupby("format", sort=False):
        for mode, dash in _DASHES.items():
            here = of[of["mode"] == mode]
            line(
                made, numbers(here, "layer"), numbers(here, "agreement"),
                f"{shown(name)}, {_WORDS[mode]}", ".1%", line_dash=dash,
            )  # fmt: skip
    steps(made, "layer")
    made.update_yaxes(title_text="experts chosen as before", tickformat=".0%")
    return made


_WHOSE = {"router": "routers", "experts": "experts", "both": "routers and experts"}
