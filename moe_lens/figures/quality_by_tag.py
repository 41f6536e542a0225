"""Loss, drops and router entropy of each tag, side by side."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels, names_of
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal, percent

PARTS = (
    ("loss", "loss per token", ".4~f", ""),
    ("dropped_rate", "dropped choices", ".3~%", ".2~%"),
    ("unserved_rate", "unserved tokens", ".3~%", ".2~%"),
    ("entropy_norm", "entropy / ln E", ".3~f", ""),
)
"""Column, axis, format of the hover text, format of the ticks."""


def quality_by_tag(table: pd.DataFrame) -> go.Figure:
    """A row a tag, worst loss on top; a column for each number that was recorded.

    Args:
        table: Answer of `quality_by_tag`.
    """
    table = one_run(table)
    parts = [part for part in PARTS if known(table, part[0])]
    if not parts:
        if len(table):
            return blank(
                "Quality by tag",
                "Nothing of this was recorded.",
                "No losses, drops or router entropy",
                lacks=("losses",),
            )
        return blank("Quality by tag", "No valid token was routed.")
    first = parts[0][0]
    table = table.sort_values(first, ascending=False, kind="stable", na_position="last")
    made = figure(_title(table), "Mean over tokens; layers together")
    gap = 0.04
    width = (1 - gap * (len(parts) - 1)) / len(parts)
    for i, (column, axis, form, ticks) in enumerate(parts):
        number = "" if i == 0 else str(i + 1)
        made.add_bar(
            y=list(range(len(table))),
            x=numbers(table, column),
            xaxis=f"x{number}",
            orientation="h",
            text=names_of(list(table["tag"])),
            textposition="none",
            customdata=numbers(table, "tokens"),
            hovertemplate=f"<b>%{{text}}</b><br>{axis} %{{x:{form}}} (%{{customdata:,}} tokens)"
            "<extra></extra>",
            name=axis,
        )
        start = i * (width + gap)
        made.update_layout(
            {
                f"xaxis{number}": {
                    "domain": [start, min(start + width, 1)],
                    "title": {"text": axis},
                    "tickformat": ticks,
                    "nticks": 4,
                    "rangemode": "tozero",
                }
            }
        )
    labels(made, list(table["tag"]))
    made.update_layout(showlegend=False)
    return made


def _title(table: pd.DataFrame) -> str:
    if known(table, "loss"):
        worst = table.iloc[0]
        return (
            f"{shown(worst['tag'], 24)} has the highest loss: {decimal(worst['loss'], 3)}, "
            f"{percent(worst['dropped_rate'])} dropped"
        )
    return "Drops and router entropy by tag (no loss was recorded)"
