"""Whether the router chose well, where it is sure and where it is not."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import labels
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run, top
from moe_lens.figures.dots import dots
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, digits

_KINDS = {
    "regret": "regret",
    "random_regret": "of a drawn route",
    "mean_route": "mean route",
}


def regret_by_slice(table: pd.DataFrame) -> go.Figure:
    """Regret of the router's route by slice of tokens, beside that of a route that is drawn.

    Args:
        table: Answer of `route_regret`, of one layer or of all together.
    """
    table = one_run(table)
    if not known(table, "regret"):
        return blank(
            "Route regret",
            "No other routes of single tokens were measured: moe-lens counterfactual "
            "--regret-tokens says of how many.",
        )
    table = table[numbers(table, "tokens") > 0]
    most = top(table, "regret")
    made = figure(
        f"Regret is highest for {shown(most['slice'], 24)}: {digits(most['regret'])}"
        + (
            f", of a drawn route {digits(most['random_regret'])}"
            if pd.notna(most["random_regret"])
            else ""
        ),
        "Loss minus the least loss of the drawn routes, beside what a router that knows nothing "
        "would have",
    )
    names = list(table["slice"])
    for column, kind in _KINDS.items():
        dots(
            made,
            list(range(len(names))),
            numbers(table, column),
            names,
            kind,
            f"{kind}: %{{x:.4~f}}, {count(table['tokens'].sum())} tokens in all",
            None,
            numbers(table, "regret_error") if column == "regret" else None,
        )
    labels(made, names, per_label=2)
    made.update_yaxes(showgrid=True)
    made.add_vline(x=0)
    made.update_xaxes(title_text="loss per token", tickformat=".3~g")
    made.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return made
