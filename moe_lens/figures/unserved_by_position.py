"""Whether tokens late in their sequence lose their experts."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import means, numbers, one_run
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, percent


def unserved_by_position(table: pd.DataFrame) -> go.Figure:
    """Dropped share of choices and unserved share of tokens along the sequence, over all layers.

    Args:
        table: Answer of `unserved_by_position`.
    """
    table = one_run(table)
    if not len(table):
        return blank(
            "Drops along the sequence",
            "No per-token rows were recorded: record(..., tokens=...) keeps them.",
        )
    if not numbers(table, "dropped").sum() > 0 and not numbers(table, "unserved").sum() > 0:
        kept = count(numbers(table, "tokens").sum())
        return blank("Drops along the sequence", f"No token was dropped in {kept} token-layers.")
    dropped = means(table, "position", "dropped_rate", "tokens").dropna()
    unserved = means(table, "position", "unserved_rate", "tokens").dropna()
    worst = dropped.index[int(dropped.argmax())]
    made = figure(
        f"Drops are highest from position {count(worst)}: {percent(dropped.max())} of choices",
        "Share of choices dropped and of tokens served by no expert, mean over layers",
    )
    line(made, dropped.index, dropped, "dropped choices", ".3~%")
    line(made, unserved.index, unserved, "unserved tokens", ".3~%")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="position in the sequence (tokens)", tickformat=",d")
    made.update_yaxes(title_text="share", tickformat=".2~%", rangemode="tozero")
    return made
