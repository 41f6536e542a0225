"""Sets of experts in use, of all that there are, as inputs have more dimensions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, percent


def realised_sets(table: pd.DataFrame) -> go.Figure:
    """Used sets over the hidden size, beside the sets that are possible.

    Args:
        table: A row a hidden size, of one m and k: `hidden`, `used`, `possible`, `tokens`.
    """
    table = one_run(table)
    if not known(table, "used"):
        return blank("Sets of experts in use", "No router has been looked at.")
    table = table.sort_values("hidden")
    first = table.iloc[0]
    share = percent(first["used"] / first["possible"])
    made = figure(
        f"With {count(first['hidden'])} inputs {count(first['used'])} of "
        f"{count(first['possible'])} sets are in use ({share})",
        f"Random routers, {count(first['experts'])} experts, {count(first['top_k'])} a token; "
        f"different sets among {count(first['tokens'])} tokens",
    )
    hidden = numbers(table, "hidden")
    line(made, hidden, numbers(table, "used"), "in use", ",.0f")
    possible = np.asarray(numbers(table, "possible"))
    line(made, hidden, possible, "possible, C(m, k)", ",.0f", line_dash="dash")
    made.update_xaxes(title_text="hidden size (d)", type="log", tickvals=hidden)
    made.update_yaxes(title_text="sets of experts", type="log", tickformat=",~s")
    made.update_layout(hovermode="x unified")
    return made
