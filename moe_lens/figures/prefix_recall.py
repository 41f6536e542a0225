"""How much of a conversation's later routing its beginning foretells, by how long it is."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

_LINES = (
    ("oracle", "best, in hindsight"),
    ("prefix", "by the beginning"),
    ("popularity", "by popularity"),
)


def prefix_recall(table: pd.DataFrame) -> go.Figure:
    """Recall over the length of the beginning, for as many experts named in each way.

    Args:
        table: A row a beginning: `tokens`, `size` (experts named), and the recall `prefix`,
            `popularity`, `oracle` and `chance`, as `moe_lens.metrics.constellation` has them.
    """
    table = one_run(table)
    if not known(table, "prefix"):
        return blank(
            "What a beginning foretells",
            "No sequence with rows from its first token on is long enough: "
            "record(..., tokens=...) keeps them.",
            "No sequence with rows from its first token on is long enough",
        )
    table = table.sort_values("tokens")
    last = table[numbers(table, "prefix") >= 0].iloc[-1]
    popular = percent(float(last["popularity"]))
    beside = f", as many popular ones {popular}" if known(table, "popularity") else ""
    made = figure(
        f"The {last['size']:.0f} experts that {last['tokens']:.0f} tokens chose most take "
        f"{percent(float(last['prefix']))} of what follows{beside}",
        "Share of the choices after the beginning that are of the experts named. Popularity is of "
        "the other sequences; each beginning is scored on what comes after it",
    )
    tokens = numbers(table, "tokens")
    for column, name in _LINES:
        if known(table, column):
            line(made, tokens, numbers(table, column), name, ".3~%")
    line(made, tokens, numbers(table, "chance"), "by chance", ".3~%", line_dash="dash")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="tokens of the beginning", tickformat=",d")
    made.update_yaxes(title_text="recall", tickformat=".2~%", rangemode="tozero")
    return made
