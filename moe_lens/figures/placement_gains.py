"""What plans gained in the windows after those that they were fitted to."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import count


def placement_gains(table: pd.DataFrame) -> go.Figure:
    """Share of the slowest ranks' rows that was saved, window by window, and what would count.

    Args:
        table: A row for each window that was judged: `window` (from 1), `gain` (a share), `least`
            (the share that is worth it).
    """
    table = one_run(table)
    if not known(table, "gain"):
        return blank("Gain of a placement", "There are too few forwards to judge a placement by.")
    gain, least = numbers(table, "gain"), numbers(table, "least")
    enough = int((gain > least).sum())
    made = figure(
        f"{count(enough)} of {count(len(gain))} windows gain more than {100 * least[0]:g} %",
        "Rows that the slowest ranks were spared; each window by the plan of the one before",
    )
    line(made, table["window"], gain, "gain", ".2%")
    line(made, table["window"], least, "worth it", ".2%", line_dash="dot")
    made.update_xaxes(title_text="window", dtick=1)
    made.update_yaxes(title_text="share of rows", tickformat=".0%")
    return made
