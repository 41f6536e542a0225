"""Which experts one request used."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import matrix, numbers, one_run, top
from moe_lens.figures.heat import amounts, heat
from moe_lens.figures.theme import AMOUNT, figure
from moe_lens.numbers import count


def request_load(table: pd.DataFrame) -> go.Figure:
    """Tokens of the request by layer and expert.

    Args:
        table: Answer of `request_load`.
    """
    table = one_run(table)
    chosen = numbers(table, "chosen")
    if not chosen.sum() > 0:
        return blank("Experts of this request", "No rows of this request were kept.")
    cells = matrix(table, "layer", "expert", "chosen").fillna(0)
    most = top(table, "chosen")
    where = f"layer {most['layer']}, expert {most['expert']}"
    made = figure(
        f"Most used: {where} by {count(most['chosen'])} tokens",
        f"{count((chosen > 0).sum())} experts in all; tokens that chose each",
    )
    heat(
        made,
        cells,
        AMOUNT,
        hovertemplate="layer %{y}, expert %{x}<br><b>%{z:,}</b> tokens of the request",
    )
    made.update_xaxes(title_text="expert")
    made.update_yaxes(title_text="layer")
    made.update_layout({AMOUNT: amounts("tokens", chosen.max())})
    return made
