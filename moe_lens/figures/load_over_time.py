"""Since when the load is uneven, and in which layers."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, means, one_run
from moe_lens.figures.layered import layered, steps
from moe_lens.figures.theme import figure
from moe_lens.numbers import times


def load_over_time(table: pd.DataFrame) -> go.Figure:
    """Load of each layer's hottest expert over the mean, step by step.

    Args:
        table: Answer of `load_over_time`.
    """
    table = one_run(table)
    if not known(table, "max_over_mean"):
        return blank("Imbalance over time", "No valid token was routed.")
    worst = means(table, "layer", "max_over_mean", "assignments").dropna()
    made = figure(
        f"Layer {worst.idxmax()} is the least even: hottest expert {times(worst.max())} the mean",
        "Load of each layer's hottest expert over the mean expert (1: all equal)",
    )
    layered(made, table, "step", "max_over_mean", worst.idxmax())
    steps(made)
    made.update_yaxes(title_text="hottest expert / mean", rangemode="tozero")
    made.add_hline(y=1)
    return made
