"""A figure that says in a sentence why there is nothing to draw."""

from __future__ import annotations

from textwrap import wrap

import plotly.graph_objects as go

from moe_lens.figures.theme import figure

_WIDTH = 76
"""Letters of a line: what fits into half a page."""


def blank(title: str, sentence: str) -> go.Figure:
    """No axes, one sentence.

    Args:
        title: What the figure would have shown.
        sentence: What was not recorded or did not happen, and how to record it; no text from data.
    """
    # A call stays on one line: no-break spaces are not broken at.
    lines = wrap(sentence.replace("(..., ", "(...,\u00a0"), _WIDTH)
    made = figure(title, height=80 + 20 * len(lines))
    made.add_annotation(
        text="<br>".join(lines),
        xref="paper",
        yref="paper",
        x=0,
        y=1,
        xanchor="left",
        yanchor="top",
        align="left",
        font_size=13,
    )
    made.update_layout(margin={"l": 14, "t": 48, "b": 16})
    made.update_xaxes(visible=False)
    made.update_yaxes(visible=False)
    return made
