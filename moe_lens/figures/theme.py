"""The look of every figure: one Plotly template, light and dark.

Whatever depends on the look stands in the template, colour scales too (as colour axes), so that a
figure drawn in light becomes a dark one by its template alone: `dressed`, or in a browser.
"""

from __future__ import annotations

from functools import cache

import plotly.graph_objects as go

from moe_lens.figures.palette import DARK, LIGHT, Palette

AMOUNT, RATIO, CHANGE = "coloraxis", "coloraxis2", "coloraxis3"
"""Colour axes: from nothing up; log2 of a ratio with a mark for never; log2 of a ratio without."""

OCTAVES = 3.0
"""A ratio's colours run from 1/8 to 8; what lies beyond has the last colour and an exact number."""
NEVER = -OCTAVES - 0.6
"""Where on the axis RATIO a ratio of 0 stands."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', Helvetica, Arial, sans-serif"


def figure(title: str, subtitle: str = "", *, height: int = 380) -> go.Figure:
    """An empty figure that has the look.

    Args:
        title: What is seen, in a few words. Text from data must have gone through `text.shown`.
        subtitle: What the axes do not say.
        height: Pixels.
    """
    made = go.Figure()
    made.update_layout(
        template=template(),
        title={"text": title, "subtitle": {"text": subtitle}},
        height=height,
    )
    return made


def dressed(made: go.Figure, *, dark: bool) -> go.Figure:
    """A copy of a figure of ours in the light or the dark look."""
    return go.Figure(made).update_layout(template=template(dark=dark))


@cache
def template(*, dark: bool = False) -> go.layout.Template:
    """The Plotly template."""
    colours = DARK if dark else LIGHT
    axis = {
        "gridcolor": colours.grid,
        "zerolinecolor": colours.grid,
        "linecolor": colours.grid,
        "tickfont": {"size": 11, "color": colours.muted},
        "title": {"font": {"size": 12, "color": colours.muted}, "standoff": 8},
        "automargin": True,
        "zeroline": False,
        "ticklabelstandoff": 4,
    }
    bar = {
        "outlinewidth": 0,
        "thickness": 12,
        "tickfont": {"size": 11, "color": colours.muted},
        "title": {"side": "top", "font": {"size": 12, "color": colours.muted}},
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": colours.paper,
            "plot_bgcolor": colours.paper,
            "font": {"family": _FONT, "size": 12, "color": colours.text},
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 14, "l": 14},
                "font": {"size": 16, "weight": 600},
                "subtitle": {"font": {"size": 12, "color": colours.muted}},
            },
            "margin": {"l": 64, "r": 24, "t": 76, "b": 52},
            "colorway": list(colours.lines),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": colours.paper,
                "bordercolor": colours.muted,
                "font": {"family": _FONT, "size": 12, "color": colours.text},
                "align": "left",
                "namelength": -1,
            },
            "legend": {"font": {"size": 11}, "title": {"font": {"size": 11}}},
            "separators": ".,",
            "bargap": 0.25,
            "shapedefaults": {"line": {"color": colours.muted, "width": 1, "dash": "dot"}},
            "annotationdefaults": {
                "font": {"size": 11, "color": colours.muted},
                "showarrow": False,
            },
            AMOUNT: {"colorscale": _even(colours.amount), "colorbar": bar},
            RATIO: {"colorscale": _with_never(colours), "colorbar": bar},
            CHANGE: {"colorscale": _even(colours.ratio), "colorbar": bar},
        },
        data={
            "bar": [{"marker": {"line": {"width": 0}}}],
            "scatter": [{"line": {"width": 2}, "marker": {"size": 6}}],
        },
    )


def _even(colours: tuple[str, ...]) -> list[list[float | str]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _with_never(colours: Palette) -> list[list[float | str]]:
    """The ratio's ramp above a band of one colour, for the axis from `NEVER` to `OCTAVES`."""
    # The band ends half way, so that rounding in the browser moves nothing across.
    start = (-OCTAVES - NEVER) / (OCTAVES - NEVER)
    ramp = [[start + (1 - start) * at, colour] for at, colour in _even(colours.ratio)]  # type: ignore[operator]
    return [[0.0, colours.never], [start / 2, colours.never], [start / 2, ramp[0][1]], *ramp]
