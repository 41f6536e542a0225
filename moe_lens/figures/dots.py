"""Values of things with a name, as dots on lines: for what does not start at zero."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from moe_lens.figures.bars import names_of


def dots(
    made: go.Figure,
    places: Sequence[int],
    values: object,
    names: Sequence[object],
    kind: str,
    hover: str,
    customdata: object,
    error: object = None,
) -> None:
    """One kind of dot.

    Args:
        made: Gets the trace.
        places: y of each dot.
        values: x of each dot.
        names: What each is called in the hover text.
        kind: In the legend.
        hover: Rest of the hover text.
        customdata: What it names.
        error: Half lengths of error bars.
    """
    made.add_scatter(
        y=places,
        x=values,
        mode="markers",
        name=kind,
        marker_size=10,
        text=names_of(names),
        customdata=customdata,
        error_x=None if error is None else {"type": "data", "array": error, "thickness": 1.5},
        hovertemplate="<b>%{text}</b><br>" + hover + "<extra></extra>",
    )
