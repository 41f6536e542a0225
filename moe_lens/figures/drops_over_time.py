"""Since when choices are dropped."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import means, numbers, one_run
from moe_lens.figures.layered import line, steps
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, percent


def drops_over_time(table: pd.DataFrame) -> go.Figure:
    """Overflowed and dropped share of all layers' choices, step by step, and of the worst layer.

    Args:
        table: Answer of `load_over_time`.
    """
    table = one_run(table)
    if not len(table):
        return blank("Drops over time", "No valid token was routed.")
    if not (numbers(table, "overflow_rate") > 0).any():
        return blank("Drops over time", "No expert was ever full: nothing overflowed or dropped.")
    dropped = means(table, "step", "dropped_rate", "assignments")
    overflowed = means(table, "step", "overflow_rate", "assignments")
    made = figure(
        _title(dropped),
        "Share of choices that found the expert full, and of dropped ones",
    )
    if not overflowed.equals(dropped):  # else the same line twice
        line(made, overflowed.index, overflowed, "overflowed", ".3~%")
    line(made, dropped.index, dropped, "dropped", ".3~%")
    by_layer = means(table, "layer", "dropped_rate", "assignments").dropna()
    if len(by_layer) > 1 and by_layer.max() > 0:
        worst = table[table["layer"] == by_layer.idxmax()]
        rates = numbers(worst, "dropped_rate")
        line(made, worst["step"], rates, f"dropped, layer {by_layer.idxmax()}", ".3~%")
    steps(made)
    made.update_yaxes(title_text="share of choices", tickformat=".2~%", rangemode="tozero")
    return made


def _title(dropped: pd.Series[float]) -> str:
    lossy = dropped[dropped > 0]
    if lossy.empty:
        return "No choice was dropped: what overflowed went to other experts"
    return f"Drops since step {count(lossy.index[0])}, at most {percent(lossy.max())} of choices"
