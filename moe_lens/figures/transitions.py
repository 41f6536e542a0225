"""Where the tokens of each expert go in the next layer."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import counts, known, matrix, one_run, top
from moe_lens.figures.heat import amounts, heat, whole
from moe_lens.figures.theme import AMOUNT, figure
from moe_lens.numbers import count, percent


def transitions(table: pd.DataFrame) -> go.Figure:
    """Share of each expert's tokens by their first choice in the next layer.

    Args:
        table: Answer of `layer_transitions`.
    """
    table = one_run(table)
    if not known(table, "tokens"):
        return blank(
            "From layer to layer",
            "Nothing of this was recorded: it takes per-token rows (record(..., tokens=...)) "
            "and a next layer.",
            "No gate weights, which would tell a token's first choice",
            lacks=("weights", "tokens"),
        )
    share = matrix(table, "expert", "next_expert", "share").fillna(0)
    tokens = matrix(table, "expert", "next_expert", "tokens")
    most = top(table, "tokens")
    made = figure(
        f"Most trodden: expert {most['expert']} to {most['next_expert']}, {count(most['tokens'])} "
        f"tokens ({percent(most['share'])} of its own)",
        "Share of each expert's tokens by their first choice in the next layer",
    )
    heat(
        made,
        share,
        AMOUNT,
        hovertemplate="expert %{y}, then %{x}<br><b>%{z:.2%}</b> of its tokens: %{customdata:,}",
        customdata=counts(tokens),
        square=True,
    )
    whole(made.layout.yaxis, len(share.index))
    made.update_xaxes(title_text="first choice in the next layer")
    made.update_yaxes(title_text="first choice")
    made.update_layout({AMOUNT: amounts("share of tokens", share.to_numpy().max(), ".2~%")})
    return made
