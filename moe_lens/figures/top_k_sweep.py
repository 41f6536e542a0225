"""What fewer and more experts a token would do to the loss."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run, top
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import layered
from moe_lens.figures.theme import figure
from moe_lens.numbers import digits


def top_k_sweep(table: pd.DataFrame) -> go.Figure:
    """Cost over the experts that a token uses, one layer at a time, a line a layer.

    Args:
        table: Answer of `route_changes`.
    """
    table = one_run(table)
    table = table[table["intervention"] == "top_k"]
    if not known(table, "cost"):
        return blank("Another top-k", "No other top-k was measured.")
    most, at = top(table, "cost"), int(numbers(table, "cost").argmin())
    least, error = table.iloc[at], numbers(table, "cost_error")[at]
    title = f"Top-{most['number']} of layer {most['layer']} costs most: {digits(most['cost'])}"
    if least["cost"] < -2 * error:  # nor where the error is not known
        title += f"; top-{least['number']} of layer {least['layer']} gains {digits(-least['cost'])}"
    made = figure(
        title, "Mean change of the loss, ± error; one layer at a time, all its tokens at once"
    )
    layered(made, table, "number", "cost", most["layer"], form=".4~f", error="cost_error")
    own = set(numbers(table, "own")[numbers(table, "own") > 0].tolist())
    if len(own) == 1:
        made.add_vline(x=own.pop())
    made.add_hline(y=0)
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="experts a token uses (line: its own)")
    whole(made.layout.xaxis, table["number"].nunique())
    made.update_yaxes(title_text="cost (loss per token)", tickformat=".3~g")
    return made
