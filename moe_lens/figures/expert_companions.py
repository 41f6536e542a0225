"""Which experts are chosen together with one."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import numbers, one_run
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent


def expert_companions(table: pd.DataFrame) -> go.Figure:
    """Share of the expert's tokens that also chose another, and what independence would give.

    Args:
        table: Answer of `expert_companions`.
    """
    table = one_run(table)
    if not len(table):
        return blank(
            "Companions of this expert",
            "No kept token chose it together with another expert "
            "(per-token rows: record(..., tokens=...)).",
            "No token is known that chose it together with another expert",
        )
    table = table.sort_values("share", ascending=False, kind="stable")
    places = list(range(len(table)))
    first = table.iloc[0]
    made = figure(
        f"{percent(first['share'])} of its tokens also choose expert {first['companion']}",
        "Share of the expert's tokens; the mark is what independent choices would give",
    )
    made.add_bar(
        y=places,
        x=numbers(table, "share"),
        orientation="h",
        name="seen",
        customdata=table[["companion", "together", "lift"]].to_numpy(float),
        hovertemplate="expert %{customdata[0]}<br><b>%{x:.2%}</b>: %{customdata[1]:,} tokens, "
        "lift %{customdata[2]:.3~f}<extra></extra>",
    )
    made.add_scatter(
        y=places,
        x=expected_share(table),
        mode="markers",
        name="by chance",
        marker={"symbol": "line-ns-open", "size": 14, "line": {"width": 2}},
        hovertemplate="%{x:.2%} by chance<extra></extra>",
    )
    labels(made, [f"expert {other}" for other in table["companion"]])
    made.update_xaxes(title_text="share of tokens", tickformat=".2~%", rangemode="tozero")
    return made


def expected_share(table: pd.DataFrame) -> pd.Series[float]:
    """By chance, as a share of the expert's tokens: share / lift, whatever unit `expected` has."""
    lift = pd.Series(numbers(table, "lift"))
    return pd.Series(numbers(table, "share")) / lift.where(lift > 0)
