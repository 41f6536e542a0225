"""Where routes flip when weights are rounded: at small margins."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent


def flips_by_margin(table: pd.DataFrame) -> go.Figure:
    """Share of tokens with other experts over quantiles of the router's margin, a line a format.

    Args:
        table: `flips_by_margin` of `moe_lens.metrics.precision`: `format`, `part`, `bucket`,
            `flipped`. Of several parts the first one is drawn.
    """
    table = one_run(table)
    if not known(table, "flipped"):
        return blank("Flips by margin", "No rounded routers have been measured.")
    table = table[table["part"] == table["part"].iloc[0]].sort_values("bucket")
    buckets = int(numbers(table, "bucket").max())
    worst = table.iloc[int(numbers(table, "flipped").argmax())]
    made = figure(
        f"With {shown(worst['format'])}, {percent(float(worst['flipped']))} of the tokens in "
        f"part {worst['bucket']} of {buckets} go to other experts",
        "Tokens by the margin of their router before rounding, the least sure first",
    )
    for name, of in table.groupby("format", sort=False):
        line(made, numbers(of, "bucket"), numbers(of, "flipped"), shown(name), ".2%")
    made.update_xaxes(title_text=f"margin, {buckets} parts of equal size", dtick=1)
    made.update_yaxes(title_text="tokens with other experts", tickformat=".0%", rangemode="tozero")
    made.update_layout(hovermode="x unified")
    return made
