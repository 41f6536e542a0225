"""Horizontal bars with a label each, most important on top."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from moe_lens.figures.text import shown

_LABEL = 28
"""Letters of a label on the axis; the hover text has all of them."""
_AIRY = 16
"""Up to so many labels there is room between them."""


def labels(made: go.Figure, names: Sequence[object], *, per_label: int = 1) -> None:
    """A y axis on which place i (from the top) is called names[i], and a height to fit.

    Places are numbers, so that two long names that look the same when cut stay two, and a tag named
    "7" or "2024-01-01" is no number and no date.

    Args:
        made: A figure whose traces have y = 0, 1, ….
        names: Labels, from the top.
        per_label: Bars beside each other at one label.
    """
    made.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[shown(name, _LABEL) for name in names],
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
    )
    row = 12 + 12 * per_label if len(names) <= _AIRY else 9 + 9 * per_label
    made.update_layout(height=150 + max(len(names) * row, 60))
    made.update_yaxes(tickfont_size=11)


def names_of(values: Sequence[object]) -> list[str]:
    """Labels in full, for hover texts."""
    return [shown(value) for value in values]
