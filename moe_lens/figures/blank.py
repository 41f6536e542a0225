"""A figure that says in a sentence why there is nothing to draw.

How to record what is missing helps nobody whose trace was imported: `because` then says why.
"""

from __future__ import annotations

from textwrap import wrap

import plotly.graph_objects as go

from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.lacking import Told, not_there

_WIDTH = 66
"""Letters of a line: what fits into half a page."""


def blank(
    title: str, sentence: str, instead: str = "", *, lacks: tuple[str, ...] = ()
) -> go.Figure:
    """No axes, one sentence.

    Args:
        title: What the figure would have shown.
        sentence: What was not recorded or did not happen, and how to record it; no text from data.
        instead: What is missing, for traces that were imported, without a full stop.
        lacks: Keys of what an imported trace says that it lacks, which would be the reason.
    """
    made = _written(title, sentence)
    if instead:
        made.update_layout(meta={"title": title, "instead": instead, "lacks": list(lacks)})
    return made


def because(made: go.Figure, told: Told) -> go.Figure:
    """A figure of this trace: a blank one of an imported trace says why, not how to record it."""
    said = made.layout.meta
    if not told.imported or not said:
        return made
    why = f": {shown(not_there(told, *said['lacks']))}" if said["lacks"] else ""
    return _written(said["title"], f"{said['instead']}{why}.")


def _written(title: str, sentence: str) -> go.Figure:
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
