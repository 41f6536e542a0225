"""How sure the routers are, as time goes by."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, means, numbers, one_run
from moe_lens.figures.layered import MOST_LINES, layered, line, steps
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure

VALUES = {
    "entropy_norm": ("Router entropy", "entropy / ln E (0: certain, 1: undecided)", True),
    "margin": ("Margin", "k-th minus next selection score", True),
    "top1_prob": ("Top-1 probability", "largest router probability", False),
    "zloss": ("Z-loss", "squared logsumexp of the logits (nats²)", False),
}
"""What can be drawn: its name, its axis, and whether low values are what stands out."""


def router_over_time(table: pd.DataFrame, value: str = "entropy_norm") -> go.Figure:
    """Router entropy, margin, top-1 probability or z-loss, by tag if the table has several.

    Args:
        table: Answer of `router_over_time`.
        value: entropy_norm, margin, top1_prob or zloss.

    Raises:
        ValueError: No such value.
    """
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}; got {value!r}.")
    name, axis, lowest = VALUES[value]
    table = one_run(table)
    if not known(table, value):
        why = "No token was routed." if not len(table) else f"These routers have no {name.lower()}."
        return blank(
            f"{name} over time",
            f"Nothing of this was recorded: {why}",
            f"No {name.lower()}" if len(table) else "",
            lacks=("entropy",),
        )
    if table["tag"].nunique() > 1:
        made = figure(f"{name} by tag", "Mean over layers and tokens, per step")
        # Those with most tokens: there are no more colours to tell them apart.
        most = table.groupby("tag")["tokens"].sum().nlargest(MOST_LINES).index
        for tag in most:
            of = means(table[table["tag"] == tag], "step", value, "tokens")
            line(made, of.index, of, shown(tag, 40), ".4~f")
    else:
        by_layer = means(table, "layer", value, "tokens").dropna()
        at = int(by_layer.argmin() if lowest else by_layer.argmax())
        of_layer = f"{'lowest' if lowest else 'highest'} in" if len(by_layer) > 1 else "of"
        made = figure(
            f"{name} {of_layer} layer {by_layer.index[at]}: {by_layer.iloc[at]:.3g}",
            "Mean over valid tokens, per step",
        )
        layered(made, table, "step", value, by_layer.index[at], form=".4~f")
    steps(made)
    made.update_yaxes(title_text=axis)
    if value in ("entropy_norm", "top1_prob") and (numbers(table, value) >= 0).any():
        made.update_yaxes(rangemode="tozero")
    return made
