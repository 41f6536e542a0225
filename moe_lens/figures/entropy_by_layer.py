"""Which routers are sure and which are not."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, means, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import MOST_LINES, line
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal

NO_TOKEN = "no token was routed."


def entropy_by_layer(table: pd.DataFrame) -> go.Figure:
    """Router entropy of each layer, by tag if the table has several.

    Args:
        table: Answer of `router_confidence`.
    """
    table = one_run(table)
    if not known(table, "entropy_norm"):
        why = "these routers have no distribution over experts." if len(table) else NO_TOKEN
        return blank(
            "Router entropy by layer",
            f"Nothing of this was recorded: {why}",
            "No router entropy" if len(table) else "",
            lacks=("entropy",),
        )
    overall = means(table, "layer", "entropy_norm", "tokens").dropna()
    made = figure(
        f"Layer {overall.idxmin()} is the surest router: entropy {decimal(overall.min())}"
        f" (highest: {decimal(overall.max())})",
        "Mean over tokens of the entropy over ln E (0: certain, 1: undecided)",
    )
    most = table.groupby("tag")["tokens"].sum().nlargest(MOST_LINES)
    for tag in most.index:
        of = means(table[table["tag"] == tag], "layer", "entropy_norm", "tokens")
        line(made, of.index, of, shown(tag, 40), ".4~f")
    made.update_layout(hovermode="x unified", showlegend=len(most) > 1)
    made.update_xaxes(title_text="layer")
    whole(made.layout.xaxis, len(overall))
    made.update_yaxes(title_text="entropy / ln E", rangemode="tozero")
    return made
