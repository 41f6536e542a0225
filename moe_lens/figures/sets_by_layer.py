"""How many of the sets of experts that each router can reach its tokens use."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import line, logarithmic
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, percent

_LINES = {
    "used": ("in use", {}),
    "at_least": ("at least, with sets not seen (Chao)", {"line_dash": "dot"}),
    "chance": ("seen of a router that draws sets alike", {"line_dash": "dashdot"}),
    "possible": ("that the router can reach", {"line_dash": "dash"}),
}


def sets_by_layer(table: pd.DataFrame) -> go.Figure:
    """Different sets of experts by layer, beside those by chance and those that there are.

    Args:
        table: A row a layer: `layer`, `tokens`, `used`, `at_least`, `chance`, `possible`
            (null: not known).
    """
    table = one_run(table)
    if not known(table, "used"):
        return blank("Sets of experts in use", "No choices of single tokens were kept here.")
    table = table[np.isfinite(numbers(table, "used"))].sort_values("layer")
    over = numbers(table, "used") / np.fmax(numbers(table, "chance"), 1)
    at = (
        int(np.nanargmin(over)) if np.isfinite(over).any() else int(numbers(table, "used").argmin())
    )
    row = table.iloc[at]
    title = (
        f"{count(row['tokens'])} tokens use {count(row['used'])} sets in layer {row['layer']:.0f}"
    )
    if np.isfinite(over[at]):
        title += f", {percent(over[at])} of what drawing sets alike would show"
    made = figure(title, "Sets of experts that tokens choose, whatever the order")
    for column, (name, look) in _LINES.items():
        if known(table, column):
            line(made, table["layer"], numbers(table, column), name, ",.4~g", **look)
    made.update_xaxes(title_text="layer")
    whole(made.layout.xaxis, len(table))
    made.update_yaxes(title_text="sets of experts", tickformat=",~g")
    logarithmic(made, np.concatenate([numbers(table, column) for column in _LINES]))
    made.update_layout(
        hovermode="x unified", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return made
