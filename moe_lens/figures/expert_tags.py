"""Whom an expert serves."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels, names_of
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import numbers, one_run
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent, times


def expert_tags(table: pd.DataFrame) -> go.Figure:
    """Share of each tag in the expert's choices, beside its share in everyone's.

    Args:
        table: Answer of `expert_tags`.
    """
    table = one_run(table)
    if not numbers(table, "routed").sum() > 0:
        return blank("Tags of this expert", "Nobody chose this expert.")
    table = table.sort_values("share", ascending=False, kind="stable")
    top = table.iloc[0]
    lift = "" if pd.isna(top["lift"]) else f", {times(top['lift'])} its usual share"
    made = figure(
        f"{shown(top['tag'], 24)} makes {percent(top['share'])} of its choices{lift}",
        "Share of the expert's choices, and of all choices in the layer",
    )
    places = list(range(len(table)))
    hover = "<b>%{text}</b><br>%{x:.2%} of %{data.name}"
    names = names_of(list(table["tag"]))
    made.add_bar(
        y=places,
        x=numbers(table, "share"),
        orientation="h",
        name="this expert",
        text=names,
        textposition="none",
        customdata=table[["routed", "lift"]].to_numpy(float),
        hovertemplate=hover
        + "<br>%{customdata[0]:,} choices, lift %{customdata[1]:.3~f}<extra></extra>",
    )
    made.add_bar(
        y=places,
        x=numbers(table, "overall_share"),
        orientation="h",
        name="all experts",
        text=names,
        textposition="none",
        marker_color="rgba(128,136,150,0.55)",
        hovertemplate=hover + "<extra></extra>",
    )
    labels(made, list(table["tag"]), per_label=2)
    made.update_xaxes(title_text="share of choices", tickformat=".2~%", rangemode="tozero")
    return made
