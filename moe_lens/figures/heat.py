"""Matrices as heat maps that stay readable from one cell to 94 × 384."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.columns import Floats
from moe_lens.figures.theme import NEVER, OCTAVES

_FEW = 48
"""Up to so many rows and columns there is a gap between cells."""
_AROUND = 128
"""Pixels above and below the axes: the template's margins."""
_GAP = "<br>&nbsp;"
"""Between a colour bar's title and the word at its end."""


def heat(
    made: go.Figure,
    z: pd.DataFrame,
    axis: str,
    *,
    hovertemplate: str,
    text: pd.DataFrame | None = None,
    customdata: object = None,
    square: bool = False,
) -> None:
    """Draw a matrix, its first row on top, and make the figure as high as it needs.

    Args:
        made: Gets the trace.
        z: Values on the colour axis; index and columns are whole numbers.
        axis: One of the theme's colour axes.
        hovertemplate: Plotly's template.
        text: What the hover text calls `text`; a float like z.
        customdata: What the hover text calls `customdata`; [rows, columns] or [rows, columns, n].
        square: Rows and columns are the same things: no higher than wide.
    """
    gap = 1 if max(z.shape) <= _FEW else 0
    made.add_heatmap(
        # Single floats: cells are many, and colours and three digits need no more.
        z=z.to_numpy(np.float32),
        text=None if text is None else text.to_numpy(np.float32),
        x=z.columns.to_numpy(),
        y=z.index.to_numpy(),
        coloraxis=axis,
        xgap=gap,
        ygap=gap,
        customdata=customdata,
        hovertemplate=hovertemplate + "<extra></extra>",
        hoverongaps=False,
    )
    rows = len(z.index)
    plot = min(rows * 14, 640) if square else min(rows * 22, max(400, rows * 8))
    plot = max(plot, 150)
    made.update_layout(height=_AROUND + plot)
    bar = {"lenmode": "pixels", "len": min(plot, 320), "y": 1, "yanchor": "top"}
    made.update_layout({axis: {"colorbar": bar}})
    whole(made.layout.xaxis, len(z.columns))
    whole(made.layout.yaxis, rows, most=24)
    made.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    made.update_xaxes(showgrid=False, ticks="")


def whole(axis: object, n: int, most: int = 16) -> None:
    """Ticks at whole numbers, at most so many, at steps of a power of two."""
    step = 1
    while n / step > most:
        step *= 2
    axis.update(tick0=0, dtick=step, tickformat="d")  # type: ignore[attr-defined]


def octaves(ratio: Floats) -> Floats:
    """Where ratios stand on a colour axis: log2, cut at the ends; 0 is `NEVER`, NaN stays."""
    with np.errstate(divide="ignore"):
        return np.where(ratio == 0, NEVER, np.clip(np.log2(ratio), -OCTAVES, OCTAVES))


def scale(title: str, never: str = "") -> dict[str, object]:
    """The colour axis of a ratio; with a word for 0 it has the band for what never happened."""
    at = [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    words = ["¼", "½", "1", "2", "4", "8 or more"]
    # The band's word stands where that of the coldest colour would, and there is room for one.
    at = [(NEVER - OCTAVES) / 2 if never else -OCTAVES, *at]
    words = [never or "⅛ or less", *words]
    return {
        "cmin": NEVER if never else -OCTAVES,
        "cmax": OCTAVES,
        "colorbar": {"title": {"text": title + _GAP}, "tickvals": at, "ticktext": words},
    }


def amounts(title: str, most: float, tickformat: str = ",~s") -> dict[str, object]:
    """The colour axis of what goes from nothing to `most`."""
    return {
        "cmin": 0,
        "cmax": most,
        "colorbar": {"title": {"text": title + _GAP}, "tickformat": tickformat},
    }
