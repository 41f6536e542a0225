"""Whether consecutive tokens go to the same experts."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, mean, numbers, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent


def repetition(table: pd.DataFrame) -> go.Figure:
    """Share of choices that the token before made too, by layer, beside chance.

    Args:
        table: Answer of `repetition`.
    """
    table = one_run(table)
    if not known(table, "repeated_share"):
        return blank(
            "Repetition between consecutive tokens",
            "No consecutive tokens were kept: record(..., tokens=...) keeps whole sequences.",
            "No consecutive tokens of one sequence",
            lacks=("sequences", "tokens"),
        )
    share, chance = numbers(table, "repeated_share"), numbers(table, "chance")
    pairs = numbers(table, "pairs")
    made = figure(
        f"{percent(mean(share, pairs))} of choices repeat the token before "
        f"(chance: {percent(mean(chance, pairs))})",
        "Share of a token's choices that the token before it in its sequence made too",
    )
    line(made, table["layer"], share, "repeated", ".3~%")
    line(made, table["layer"], chance, "by chance", ".3~%", line_dash="dash")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="layer")
    whole(made.layout.xaxis, len(table))
    made.update_yaxes(title_text="share of choices", tickformat=".2~%", rangemode="tozero")
    return made
