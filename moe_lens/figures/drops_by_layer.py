"""In which layers choices overflow and are dropped."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import one_run, top
from moe_lens.figures.heat import whole
from moe_lens.figures.rates import nothing_lost, rates
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

BARS = 24
"""Layers up to which there is room for bars."""


def drops_by_layer(table: pd.DataFrame) -> go.Figure:
    """Overflowed and dropped share of choices, and unserved share of tokens, of each layer.

    Args:
        table: Answer of `dropped_tokens`, by tag or not.
    """
    found = rates(one_run(table), "layer")
    if not found["routed"].sum() > 0:
        return blank("Drops by layer", "No valid token was routed.")
    if not (found["overflowed"].sum() > 0 or found["unserved_tokens"].sum() > 0):
        return blank("Drops by layer", nothing_lost(found))
    worst = top(found, "dropped_rate")
    all_dropped = found["overflowed"].equals(found["dropped"])
    made = figure(
        f"Layer {int(worst['layer'])} drops most: {percent(worst['dropped_rate'])} of its choices"
        if worst["dropped"] > 0
        else "No choice was dropped: what overflowed went to other experts",
        "Dropped share of choices (nothing that overflowed was rerouted); share of unserved tokens"
        if all_dropped
        else "Overflowed and dropped share of choices; share of unserved tokens",
    )
    for name, part, of in (
        ("overflowed", "overflowed", "routed"),
        ("dropped", "dropped", "routed"),
        ("unserved tokens", "unserved_tokens", "tokens"),
    ):
        unit = "tokens" if of == "tokens" else "choices"
        if part == "overflowed" and all_dropped:
            continue  # the same bars twice
        draw = made.add_bar if len(found) <= BARS else made.add_scatter
        draw(
            x=found["layer"],
            y=found[f"{part}_rate"],
            name=name,
            customdata=found[[part, of]].to_numpy(),
            hovertemplate="<b>%{y:.2%}</b> (%{customdata[0]:,} of %{customdata[1]:,} " + unit + ")",
        )
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="layer")
    whole(made.layout.xaxis, len(found))
    made.update_yaxes(title_text="share", tickformat=".2~%", rangemode="tozero")
    return made
