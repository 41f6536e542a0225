"""On which kind of request choices are dropped."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels, names_of
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import one_run
from moe_lens.figures.rates import nothing_lost, rates
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent


def drops_by_tag(table: pd.DataFrame) -> go.Figure:
    """Dropped share of each tag's choices, over all layers of the table.

    Args:
        table: Answer of `dropped_tokens` by tag.
    """
    found = rates(one_run(table), "tag")
    if not found["routed"].sum() > 0:
        return blank("Drops by tag", "No valid token was routed.")
    if not found["dropped"].sum() > 0:
        return blank("Drops by tag", nothing_lost(found))
    found = found.sort_values("dropped_rate", ascending=False, kind="stable", na_position="last")
    worst, overall = found.iloc[0], found["dropped"].sum() / found["routed"].sum()
    made = figure(
        f"{shown(worst['tag'], 24)} loses most: {percent(worst['dropped_rate'])} of its choices",
        f"Dropped share of choices; {percent(overall)} over all tags",
    )
    made.add_bar(
        y=list(range(len(found))),
        x=found["dropped_rate"],
        orientation="h",
        text=names_of(list(found["tag"])),
        textposition="none",
        customdata=found[["dropped", "routed", "unserved_tokens"]].to_numpy(),
        hovertemplate="<b>%{text}</b><br>%{x:.3%}: %{customdata[0]:,} of %{customdata[1]:,} choices"
        "<br>%{customdata[2]:,} unserved token-layers<extra></extra>",
    )
    labels(made, list(found["tag"]))
    made.update_xaxes(title_text="dropped share of choices", tickformat=".2~%", rangemode="tozero")
    made.add_vline(x=overall)
    return made
