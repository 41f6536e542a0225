"""How well each kind of request is predicted."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run, top
from moe_lens.figures.dots import dots
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal


def loss_by_tag(table: pd.DataFrame) -> go.Figure:
    """Mean loss of each tag, a dot a phase, highest on top.

    Args:
        table: Answer of `loss_by_tag`.
    """
    table = one_run(table)
    if not known(table, "loss"):
        return blank(
            "Loss by tag",
            "Nothing of this was recorded: hand losses over with rec.loss(...).",
            "No losses",
            lacks=("losses",),
        )
    table = table[numbers(table, "loss") == numbers(table, "loss")]
    tags = list(table.groupby("tag")["loss"].max().sort_values(ascending=False).index)
    place = {tag: i for i, tag in enumerate(tags)}
    worst = top(table, "loss")
    made = figure(
        f"{shown(worst['tag'], 24)} has the highest loss: {decimal(worst['loss'], 3)} "
        f"({shown(worst['phase'], 16)})",
        "Mean per token, in the unit given to rec.loss (nats for cross-entropy)",
    )
    for phase, rows in table.groupby("phase", sort=False):
        dots(
            made,
            [place[tag] for tag in rows["tag"]],
            rows["loss"],
            list(rows["tag"]),
            shown(phase),
            "%{x:.4~f} over %{customdata:,} tokens",
            rows["loss_tokens"],
        )
    labels(made, tags)
    made.update_yaxes(showgrid=True)
    made.update_layout(showlegend=table["phase"].nunique() > 1)
    made.update_xaxes(title_text="loss per token")
    return made
