"""Which experts each tag uses more, or less, than others do."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.bars import names_of
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import counts, matrix, numbers, one_run, top
from moe_lens.figures.heat import heat, octaves, scale
from moe_lens.figures.text import shown
from moe_lens.figures.theme import RATIO, figure
from moe_lens.numbers import percent, times

ENOUGH = 100
"""Choices that a tag must have made for its lift to stand in the title."""


def tag_lift(table: pd.DataFrame) -> go.Figure:
    """Share of a tag's tokens that choose an expert, over the share of all tokens.

    Args:
        table: Answer of `tag_load`, of one layer.
    """
    table = one_run(table)
    tags = list(dict.fromkeys(table["tag"])) if len(table) else []
    if len(tags) < 2 or not numbers(table, "routed").sum() > 0:
        return blank("Experts by tag", "Fewer than two tags had tokens here.")
    rows = table.assign(row=table["tag"].map({tag: i for i, tag in enumerate(tags)}))
    lift = matrix(rows, "row", "expert", "lift")
    share = matrix(rows, "row", "expert", "share")
    routed = counts(matrix(rows, "row", "expert", "routed"))
    names = names_of(tags)
    hover = np.empty((*routed.shape, 3), object)
    hover[..., 0], hover[..., 1] = np.array(names, object)[:, None], routed
    hover[..., 2] = share.to_numpy()
    made = figure(_title(table), "Share of a tag's tokens that choose an expert, over that of all")
    heat(
        made,
        pd.DataFrame(octaves(lift.to_numpy()), lift.index, lift.columns),
        RATIO,
        hovertemplate="%{customdata[0]}, expert %{x}<br><b>%{text:.3~f}×</b> its usual share: "
        "%{customdata[2]:.2%} of the tokens, %{customdata[1]:,} choices",
        text=lift,
        customdata=hover,
    )
    made.update_xaxes(title_text="expert")
    made.update_yaxes(tickvals=list(range(len(tags))), ticktext=names, tickmode="array")
    made.update_layout({RATIO: scale("tag / all", never="never chosen")})
    return made


def _title(table: pd.DataFrame) -> str:
    often = table[(numbers(table, "routed") >= ENOUGH) & table["lift"].notna()]
    if often.empty:
        return f"Experts by tag (none was chosen {ENOUGH} times)"
    most = top(often, "lift")
    return (
        f"{shown(most['tag'], 24)} uses expert {most['expert']} {times(most['lift'])} as often as "
        f"all ({percent(most['share'])} of its tokens)"
    )
