"""Which rank sends how much to which, under one placement of the experts."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, matrix, numbers, one_run
from moe_lens.figures.heat import amounts, heat
from moe_lens.figures.text import shown
from moe_lens.figures.theme import AMOUNT, figure
from moe_lens.numbers import percent


def rank_traffic(table: pd.DataFrame) -> go.Figure:
    """Rows from each rank to each, per thousand tokens in a layer.

    Args:
        table: A row for each pair of ranks: `placement`, `source`, `destination`, `rows` (per
            thousand tokens of all ranks, a token once for each destination). What stays at home
            lies on the diagonal.
    """
    table = one_run(table)
    if not known(table, "rows"):
        return blank(
            "Traffic between ranks",
            "This run has no rows per token, so it is not known what tokens send. Record with "
            "tokens=1.0.",
            "This run has no rows per token, so it is not known what tokens send",
            lacks=("tokens",),
        )
    rows = matrix(table, "source", "destination", "rows")
    total = numbers(table, "rows").sum()
    home = numbers(table[table["source"] == table["destination"]], "rows").sum()
    made = figure(
        f"{percent(1 - home / total if total else None)} of the rows leave their rank",
        f"{shown(table['placement'].iloc[0], 40)}: rows per thousand tokens in a layer, a token "
        "once for each rank that has any of its experts",
    )
    heat(
        made,
        rows,
        AMOUNT,
        hovertemplate="rank %{y} to rank %{x}: %{z:.3~f} rows per thousand tokens",
        square=True,
    )
    made.update_layout({AMOUNT: amounts("rows", float(rows.to_numpy().max()))})
    made.update_xaxes(title_text="to rank")
    made.update_yaxes(title_text="from rank")
    return made
