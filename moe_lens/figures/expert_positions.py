"""Where in their sequence the tokens stand that an expert serves."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import numbers, one_run
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, percent


def expert_positions(table: pd.DataFrame) -> go.Figure:
    """Share of the tokens at each position that chose the expert.

    Args:
        table: Answer of `expert_serves`; of its kinds, positions are drawn.
    """
    table = one_run(table)
    table = table[table["kind"] == "position"].reset_index(drop=True)
    tokens, chosen = numbers(table, "tokens"), numbers(table, "chosen")
    if not len(table):
        return blank(
            "Positions of this expert",
            "No per-token rows were recorded in this layer: record(..., tokens=...) keeps them.",
            "No positions of single tokens",
            lacks=("sequences", "tokens"),
        )
    share = numbers(table, "share")
    overall = chosen.sum() / tokens.sum()
    top = int(pd.Series(share).fillna(-1).argmax())
    position = numbers(table, "value")
    width = float(pd.Series(position).diff().min()) if len(table) > 1 else 1.0
    made = figure(
        f"Most at positions from {count(position[top])}: {percent(share[top])} of the tokens there",
        f"Share of tokens that chose the expert; {percent(overall)} over all positions",
    )
    made.add_bar(
        x=position + (width - 1) / 2,
        y=share,
        width=width,
        customdata=pd.DataFrame({"p": position, "c": chosen, "t": tokens}).to_numpy(),
        hovertemplate="from position %{customdata[0]:,}<br><b>%{y:.2%}</b>: %{customdata[1]:,} of "
        "%{customdata[2]:,} tokens<extra></extra>",
    )
    made.update_layout(bargap=0.1)
    made.update_xaxes(title_text="position in the sequence (tokens)", tickformat=",d")
    made.update_yaxes(title_text="share of tokens", tickformat=".2~%", rangemode="tozero")
    made.add_hline(y=overall)
    return made
