"""How many of a layer's experts can be named before its router runs."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

_LINES = (
    ("last_layer", "by the last layer"),
    ("prefix", "by the conversation"),
    ("popularity", "by popularity"),
)


def prefetch(table: pd.DataFrame) -> go.Figure:
    """Recall over the number of experts fetched, for each way to predict, beside chance.

    Args:
        table: Of `moe_lens.metrics.prefetch.recall`: one layer.
    """
    table = one_run(table)
    there = [(column, name) for column, name in _LINES if known(table, column)]
    if not there:
        return blank(
            "Prefetching experts",
            "Too few tokens were kept to fit a prediction and score it: "
            "record(..., tokens=...) keeps them.",
            "Too few tokens to fit a prediction and score it",
        )
    size = numbers(table, "size")
    quarter = table.iloc[max(0, len(table) // 4 - 1)]
    column, name = max(there, key=lambda each: quarter[each[0]])
    made = figure(
        f"{quarter['size']:.0f} of {len(table)} experts named {name} are "
        f"{percent(quarter[column])} of the choices",
        "Share of a layer's choices among the experts named: by those of the layer before, by the "
        "earlier tokens of the sequence, or by popularity",
    )
    for column, name in there:
        line(made, size, numbers(table, column), name, ".3~%")
    line(made, size, numbers(table, "chance"), "by chance", ".3~%", line_dash="dash")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="experts fetched ahead")
    whole(made.layout.xaxis, len(size), 8)
    made.update_yaxes(title_text="recall", tickformat=".2~%", rangemode="tozero")
    return made
