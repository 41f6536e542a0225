"""The regions into which a router cuts a plane, one for each set of experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.text import shown
from moe_lens.figures.theme import AMOUNT, figure
from moe_lens.numbers import count

_GOLDEN = 0.618034
"""Steps of the golden section: regions met one after the other get colours far apart."""


def input_regions(table: pd.DataFrame) -> go.Figure:
    """A map of the plane, a colour a region; one that lies between the points is not in it.

    Args:
        table: A row a point: `picture` (one), `x`, `y`, `region` (a number), `chosen`.
    """
    table = one_run(table)
    if not known(table, "region"):
        return blank("Regions of the input", "No router has been looked at.")
    region = numbers(table, "region")
    made = figure(
        f"{shown(table['picture'].iloc[0])}: at least {count(table['region'].nunique())} regions",
        "Each colour is a set of experts; tokens of one region share all their experts",
        height=440,
    )
    # Points come in rows of one y each, so that a map is a matrix by x and y.
    wide = pd.DataFrame(
        {"x": numbers(table, "x"), "y": numbers(table, "y"), "at": np.arange(len(table))}
    ).pivot(index="y", columns="x", values="at")
    at = wide.to_numpy(int)
    made.add_heatmap(
        x=wide.columns.to_numpy(),
        y=wide.index.to_numpy(),
        z=((region * _GOLDEN) % 1)[at].astype(np.float32),
        text=np.array([shown(c) for c in table["chosen"]], dtype=object)[at],
        coloraxis=AMOUNT,
        hovertemplate="%{x:.2f}, %{y:.2f}<br>experts %{text}<extra></extra>",
    )
    made.update_layout({AMOUNT: {"cmin": 0, "cmax": 1, "showscale": False}})
    # Otherwise the axis would fill the width, and the map its middle.
    made.update_xaxes(title_text="first direction", showgrid=False, constrain="domain")
    made.update_yaxes(title_text="second direction", showgrid=False, scaleanchor="x")
    return made
