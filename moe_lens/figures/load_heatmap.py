"""Which experts are hot and which are dead: layers x experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import counts, matrix, numbers, one_run, top
from moe_lens.figures.heat import heat, octaves, scale
from moe_lens.figures.theme import RATIO, figure
from moe_lens.numbers import count, times

_HOVER = (
    "layer %{y}, expert %{x}<br><b>%{text:.3~f}×</b> the mean expert<br>%{customdata:,} choices"
)


def load_heatmap(table: pd.DataFrame) -> go.Figure:
    """Load of each expert over the mean of its layer.

    Args:
        table: Answer of `load_map`.
    """
    table = one_run(table)
    routed = numbers(table, "routed")
    if not routed.sum() > 0:
        return blank("Load of the experts", "No valid token was routed.")
    ratio = matrix(table, "layer", "expert", "ratio")
    made = figure(_title(table), "Choices of each expert over the mean of its layer")
    heat(
        made,
        pd.DataFrame(octaves(ratio.to_numpy()), ratio.index, ratio.columns),
        RATIO,
        hovertemplate=_HOVER,
        text=ratio,
        customdata=counts(matrix(table, "layer", "expert", "routed")),
    )
    made.update_xaxes(title_text="expert")
    made.update_yaxes(title_text="layer")
    made.update_layout({RATIO: scale("load / mean", never="never chosen")})
    return made


def _title(table: pd.DataFrame) -> str:
    ratio, routed = numbers(table, "ratio"), numbers(table, "routed")
    hottest = top(table, "ratio")
    never = int((np.isfinite(ratio) & (routed == 0)).sum())
    text = f"Layer {hottest['layer']}, expert {hottest['expert']} is hottest: "
    text += f"{times(float(hottest['ratio']))} the mean"
    return text + (f"; {count(never)} never chosen" if never else "")
