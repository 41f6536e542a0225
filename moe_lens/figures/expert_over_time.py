"""One expert's load as time goes by."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line, steps
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, percent, times


def expert_over_time(table: pd.DataFrame) -> go.Figure:
    """Load over the mean expert, and what of it was dropped.

    Args:
        table: Answer of `expert_over_time`.
    """
    table = one_run(table)
    if not known(table, "ratio"):
        return blank("Load over time", "No valid token was routed in this layer.")
    ratio, routed = numbers(table, "ratio"), numbers(table, "routed")
    dropped = numbers(table, "dropped")
    lost = f", {percent(dropped.sum() / routed.sum())} dropped" if dropped.sum() > 0 else ""
    made = figure(
        f"{count(routed.sum())} choices{lost}; at most {times(np.nanmax(ratio))} the mean",
        "Load over the mean expert of the layer (1: fair share)",
    )
    line(made, table["step"], ratio, "load / mean", ".3~f", customdata=routed)
    made.update_traces(hovertemplate="%{y:.3~f} (%{customdata:,} choices)")
    if dropped.sum() > 0:
        served = ratio * (1 - dropped / np.maximum(routed, 1))
        line(made, table["step"], served, "not dropped", ".3~f")
    steps(made)
    made.update_yaxes(title_text="load / mean expert", rangemode="tozero")
    made.add_hline(y=1)
    return made
