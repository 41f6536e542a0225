"""How many experts a conversation touches, as it goes on."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import band, line
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, decimal


def working_set(table: pd.DataFrame) -> go.Figure:
    """Distinct experts over tokens, mean and range over sequences, beside chance.

    Args:
        table: Of `moe_lens.metrics.working_set.over_time`: one layer.
    """
    table = one_run(table)
    if not known(table, "touched"):
        return blank(
            "Working set of a conversation",
            "No sequences were kept: record(..., tokens=...) keeps whole ones.",
            "No sequences that are long enough",
        )
    tokens = numbers(table, "tokens")
    # The longest sequence may be alone: the title speaks of the longest that half of them reach.
    of = numbers(table, "sequences")
    last = table[of >= of.max() / 2].iloc[-1] if known(table, "sequences") else table.iloc[-1]
    made = figure(
        f"After {count(last['tokens'])} tokens a conversation has touched "
        f"{decimal(last['touched'], 1)} experts (chance: {decimal(last['chance'], 1)})",
        "Distinct experts of the layer since a sequence began",
    )
    line(made, tokens, numbers(table, "touched"), "mean of sequences", ".3~f")
    line(made, tokens, numbers(table, "chance"), "by chance", ".3~f", line_dash="dash")
    low, high = numbers(table, "low"), numbers(table, "high")
    band(made, tokens, low, high, "fewest to most", ".3~f")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="tokens since the sequence began", type="log")
    made.update_xaxes(tickvals=tokens, ticktext=[count(n) for n in tokens])
    made.update_yaxes(title_text="distinct experts", rangemode="tozero")
    return made
