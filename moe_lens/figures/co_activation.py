"""Which experts of a layer are chosen together."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import counts, matrix, numbers, one_run, top
from moe_lens.figures.heat import heat, octaves, scale, whole
from moe_lens.figures.theme import RATIO, figure
from moe_lens.numbers import count, times

ENOUGH = 20
"""Tokens together from which a pair may stand in the title: lifts of few are chance."""


def co_activation(table: pd.DataFrame) -> go.Figure:
    """Lift of every pair: tokens that chose both, over what independent choices would give.

    Args:
        table: Answer of `co_activation`.
    """
    table = one_run(table)
    if not len(table):
        return blank(
            "Experts chosen together",
            "No kept token chose two experts in this layer "
            "(per-token rows: record(..., tokens=...)).",
            "No token is known that chose two experts in this layer",
        )
    lift = matrix(table, "expert", "other", "lift")
    together = matrix(table, "expert", "other", "together")
    made = figure(_title(table), "Tokens that chose both, over what independent choices would give")
    heat(
        made,
        pd.DataFrame(octaves(lift.to_numpy()), lift.index, lift.columns),
        RATIO,
        hovertemplate="experts %{y} and %{x}<br><b>%{text:.3~f}×</b> chance: "
        "%{customdata:,} tokens",
        text=lift,
        customdata=counts(together),
        square=True,
    )
    whole(made.layout.yaxis, len(lift.index))
    made.update_xaxes(title_text="expert")
    made.update_yaxes(title_text="expert")
    made.update_layout({RATIO: scale("together / chance", never="never together")})
    return made


def _title(table: pd.DataFrame) -> str:
    often = table[numbers(table, "together") >= ENOUGH]
    if often.empty:
        return f"Experts chosen together (no pair more than {ENOUGH - 1} times)"
    most = top(often, "lift")
    return (
        f"Experts {most['expert']} and {most['other']} go together: {times(most['lift'])} chance "
        f"({count(most['together'])} tokens)"
    )
