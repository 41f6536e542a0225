"""Which tags are routed alike."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import names_of
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, matrix, one_run, top
from moe_lens.figures.heat import amounts, heat
from moe_lens.figures.text import shown
from moe_lens.figures.theme import AMOUNT, figure
from moe_lens.numbers import digits


def tag_divergence(table: pd.DataFrame) -> go.Figure:
    """Jensen-Shannon divergence between the experts of each two tags.

    Args:
        table: `tag`, `other`, `divergence` (nats; 0: alike, ln 2: no expert in common).
    """
    table = one_run(table)
    if not known(table, "divergence"):
        return blank("How far tags are apart", "Fewer than two tags had tokens here.")
    tags = list(dict.fromkeys(table["tag"]))
    place = {tag: i for i, tag in enumerate(tags)}
    placed = table.assign(tag=table["tag"].map(place), other=table["other"].map(place))
    far = matrix(placed, "tag", "other", "divergence")
    names = names_of(tags)
    pairs = table[table["tag"] != table["other"]]
    most = top(pairs, "divergence")
    made = figure(
        f"{shown(most['tag'], 20)} and {shown(most['other'], 20)} are furthest apart: "
        f"{digits(most['divergence'])} nats",
        "Jensen-Shannon divergence of their choices of experts (0: alike, 0.693: none in common)",
    )
    both = np.array([[f"{a}, {b}" for b in names] for a in names], object)
    heat(
        made,
        far,
        AMOUNT,
        hovertemplate="%{customdata}<br><b>%{text:.4~g} nats</b>",
        text=far,
        customdata=both,
        square=True,
    )
    named = {"tickvals": list(range(len(tags))), "ticktext": names, "tickmode": "array"}
    made.update_xaxes(**named, title_text="tag")
    made.update_yaxes(**named)
    most_nats = float(np.nanmax(far.to_numpy()))
    made.update_layout({AMOUNT: amounts("nats", most_nats or 1.0, ".2~g")})
    return made
