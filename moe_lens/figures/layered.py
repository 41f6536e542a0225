"""A value of every layer along an axis: a line each while they can be told apart, then a band."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from moe_lens.figures.columns import numbers

MOST_LINES = 8
"""Lines that one figure shows; there are as many colours."""
_BAND = "rgba(128,136,150,0.22)"
_NARROW = 10
"""Ratio of the largest to the least up to which an axis is linear: a log one might have no tick."""
_WIDE = 1e5
"""The same from which powers of ten are ticks enough."""


def layered(
    made: go.Figure,
    table: pd.DataFrame,
    x: str,
    value: str,
    outstanding: object,
    *,
    form: str = ".3~f",
    error: str | None = None,
) -> None:
    """Draw `value` over `x` for every layer of the table.

    With more layers than colours: the range over layers, their median, and one that stands out.

    Args:
        made: Gets the traces.
        table: With the columns `layer`, `x` and `value`, one row for each pair of the first two.
        x: Column along the axis.
        value: Column to draw.
        outstanding: The layer that stands out, the one of the title.
        form: d3's format of the value, in hover texts.
        error: Column of the value's error, of the same unit; bars show it where each layer has a
            line.
    """
    wide = _wide(table, x, value)
    known = wide.loc[:, wide.notna().any()]
    if len(known.columns) <= MOST_LINES:
        errors = None if error is None else _wide(table, x, error)
        for layer in known:
            bars = {} if errors is None else {"error_y": _bars(errors[layer])}
            line(made, known.index, known[layer], f"layer {layer}", form, **bars)
        return
    # The lines come first, and so have the first colours; the band lies below them all the same.
    line(made, known.index, known.median(axis=1), "median layer", form)
    line(made, known.index, known[outstanding], f"layer {outstanding}", form)
    _range(made, known, form)


def _wide(table: pd.DataFrame, x: str, value: str) -> pd.DataFrame:
    """The column by x and layer."""
    return pd.DataFrame(
        {"x": numbers(table, x), "layer": table["layer"], "value": numbers(table, value)}
    ).pivot(index="x", columns="layer", values="value")


def _bars(errors: pd.Series) -> dict[str, object]:
    return {"type": "data", "array": errors, "thickness": 1, "width": 3}


def _range(made: go.Figure, wide: pd.DataFrame, form: str) -> None:
    """The range over layers, from the lowest to the highest at each x."""
    name = f"all {len(wide.columns)} layers"
    band(made, wide.index, wide.min(axis=1), wide.max(axis=1), name, form)
    made.update_layout(legend_traceorder="normal")


def band(made: go.Figure, x: object, low: ArrayLike, high: ArrayLike, name: str, form: str) -> None:
    """A grey range below the lines, from `low` to `high` at each x.

    Args:
        made: Gets the traces.
        x: Positions.
        low: Its lower edge.
        high: Its upper edge.
        name: In the legend and the hover text.
        form: d3's format of both.
    """
    below = {"x": x, "mode": "lines", "line_width": 0, "zorder": -1}
    made.add_scatter(y=low, showlegend=False, hoverinfo="skip", **below)
    made.add_scatter(
        y=high,
        fill="tonexty",
        fillcolor=_BAND,
        name=name,
        customdata=np.stack([np.asarray(low), np.asarray(high)], -1),
        hovertemplate=f"%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}}",
        **below,
    )


def line(made: go.Figure, x: object, y: object, name: str, form: str, **more: object) -> None:
    """A line with exact numbers; points are marked where they are few.

    Args:
        made: Gets the trace.
        x: Positions.
        y: Values; NaN leaves a gap.
        name: In the legend; must have gone through `text.shown` if it comes from data.
        form: d3's format of the value.
        more: What else `go.Scatter` takes.
    """
    few = len(x) <= 60  # type: ignore[arg-type]
    made.add_scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers" if few else "lines",
        hovertemplate=f"%{{y:{form}}}",
        **more,
    )


def logarithmic(made: go.Figure, drawn: ArrayLike) -> None:
    """Make the y axis logarithmic, if what is drawn goes over more than a power of ten."""
    values = np.asarray(drawn, np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    apart = values.max() / values.min()
    if apart > _NARROW:
        made.update_yaxes(type="log", dtick="D2" if apart < _WIDE else None)  # D2: 1, 2, 5, 10


def steps(made: go.Figure, title: str = "step") -> None:
    """An x axis of whole steps, and one hover text for all lines at a step."""
    made.update_xaxes(title_text=title, tickformat=",d", hoverformat=",d")
    made.update_layout(hovermode="x unified")
