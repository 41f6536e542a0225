"""What each rank has to do, forward by forward, under one placement of the experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, matrix, numbers, one_run
from moe_lens.figures.heat import heat
from moe_lens.figures.text import shown
from moe_lens.figures.theme import CHANGE, figure
from moe_lens.numbers import decimal

_OCTAVES = 1.0
"""Colours run from half an even share to twice: ranks hold many experts, and differ by less."""
_TICKS = ((0.5, "½ or less"), (0.7, "0.7"), (1.0, "1"), (1.4, "1.4"), (2.0, "2 or more"))


def rank_load(table: pd.DataFrame) -> go.Figure:
    """Rows of each rank as a multiple of an even share, forwards from left to right.

    Args:
        table: A row for each forward and rank of one layer under one placement: `placement`,
            `layer`, `forward` (from 0, in time), `step`, `rank`, `load` (rows over the mean of the
            ranks; null where the layer computed nothing).
    """
    table = one_run(table)
    if not known(table, "load"):
        return blank("Load of ranks", "No expert of this layer computed anything.")
    load = matrix(table, "rank", "forward", "load")
    steps = matrix(table, "rank", "forward", "step")
    slowest = np.nanmean(np.nanmax(load.dropna(axis=1, how="all").to_numpy(), axis=0))
    made = figure(
        f"The slowest rank takes {decimal(slowest)} times an even share",
        f"{shown(table['placement'].iloc[0], 40)}, layer {int(numbers(table, 'layer')[0])}: "
        "mean over the forwards of the most loaded rank",
    )
    with np.errstate(divide="ignore"):
        shade = load.map(np.log2).clip(-_OCTAVES, _OCTAVES)
    heat(
        made,
        shade,
        CHANGE,
        text=load,
        customdata=steps.to_numpy(),
        hovertemplate="rank %{y}, step %{customdata:,d}: %{text:.3~f} times an even share",
    )
    made.update_layout(
        {
            CHANGE: {
                "cmin": -_OCTAVES,
                "cmax": _OCTAVES,
                "colorbar": {
                    "title": {"text": "× even share<br>&nbsp;"},
                    "tickvals": [float(np.log2(at)) for at, _ in _TICKS],
                    "ticktext": [word for _, word in _TICKS],
                },
            }
        }
    )
    made.update_xaxes(title_text="forward")
    made.update_yaxes(title_text="rank")
    return made
