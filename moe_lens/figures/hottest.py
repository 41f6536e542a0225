"""The experts that each tag favours."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, one_run, top
from moe_lens.figures.heat import octaves, scale
from moe_lens.figures.text import shown
from moe_lens.figures.theme import CHANGE, figure
from moe_lens.numbers import percent, times


def hottest(table: pd.DataFrame) -> go.Figure:
    """A row a tag, its favourites from the left, each with its lift.

    Args:
        table: Answer of `hottest_experts`.
    """
    table = one_run(table)
    if not known(table, "lift"):
        return blank("Hottest experts by tag", "No tag chose an expert often enough to tell.")
    tags, places = list(dict.fromkeys(table["tag"])), int(table["place"].max())
    row = {tag: i for i, tag in enumerate(tags)}
    z = np.full((len(tags), places), np.nan)
    inside = np.full((len(tags), places), "", dtype=object)
    hover = np.full((len(tags), places), "", dtype=object)
    for each in table.to_dict("records"):
        at = row[each["tag"]], each["place"] - 1
        where = f"L{each['layer']} E{each['expert']}"
        z[at] = octaves(np.array(each["lift"], float))
        inside[at] = f"<b>{where}</b><br>{times(each['lift'])} · {percent(each['share'])}"
        hover[at] = (
            f"<b>{shown(each['tag'])}</b><br>layer {each['layer']}, expert {each['expert']}"
            f"<br>{percent(each['share'])} of the tag's choices ({each['routed']:,}), "
            f"{percent(each['overall_share'])} of everyone's: lift {each['lift']:.3g}"
        )
    most = top(table, "lift")
    made = figure(
        f"{shown(most['tag'], 24)} favours layer {most['layer']}, expert {most['expert']} most: "
        f"{times(most['lift'])} the usual share",
        "L layer, E expert: lift over all tags' share, and share of the tag's choices",
        height=160 + max(len(tags), 2) * 40,
    )
    made.add_heatmap(
        z=z,
        x=list(range(1, places + 1)),
        y=list(range(len(tags))),
        text=inside,
        texttemplate="%{text}",
        textfont_size=11,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        coloraxis=CHANGE,
        xgap=2,
        ygap=2,
        hoverongaps=False,
    )
    made.update_xaxes(title_text="place", dtick=1, showgrid=False, ticks="")
    made.update_yaxes(
        tickvals=list(range(len(tags))),
        ticktext=[shown(tag, 28) for tag in tags],
        autorange="reversed",
        showgrid=False,
        ticks="",
    )
    made.update_layout({CHANGE: scale("lift")})
    return made
