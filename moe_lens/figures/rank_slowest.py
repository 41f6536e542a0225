"""How much the slowest ranks have to do beside an even share, over time, placement by placement."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line, steps
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal


def rank_slowest(table: pd.DataFrame) -> go.Figure:
    """Rows of the slowest rank of each layer, summed, over an even share: a line a placement.

    Args:
        table: A row for each placement and forward: `placement`, `step`, `slowest` (1: even).
    """
    table = one_run(table)
    if not known(table, "slowest"):
        return blank("Slowest ranks", "No expert computed anything in these forwards.")
    means = table.groupby("placement", sort=False)["slowest"].mean()
    made = figure(
        f"{shown(means.index[0])}: {decimal(float(means.iloc[0]))} times an even share"
        + "".join(f"; {shown(name)}: {decimal(float(n))}" for name, n in means.iloc[1:2].items()),
        "Rows of the slowest rank of each layer, all layers together",
    )
    for placement, rows in table.groupby("placement", sort=False):
        line(made, rows["step"], numbers(rows, "slowest"), shown(placement), ".3~f")
    steps(made)
    made.update_yaxes(title_text="times an even share")
    return made
