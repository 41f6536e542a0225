"""What a cache of experts finds, over its size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

_LINES = (
    ("optimum", "optimum"),
    ("lru", "LRU"),
    ("lfu", "LFU"),
    ("static", "static"),
    ("static_hindsight", "static, hindsight"),
)


def hit_rates(table: pd.DataFrame) -> go.Figure:
    """Hit rates of the policies over the experts resident, beside chance.

    Args:
        table: Of `moe_lens.metrics.cache.hit_rates`: one layer.
    """
    table = one_run(table)
    if not known(table, "lru"):
        return blank(
            "Hit rates of a cache of experts",
            "Too few tokens were kept to fill a cache and count its hits: "
            "record(..., tokens=...) keeps them.",
            "Too few tokens to fill a cache and count its hits",
        )
    size = numbers(table, "size")
    half = table.iloc[int(np.argmax(size >= size[-1] / 2))]
    made = figure(
        f"With {half['size']:.0f} of {size[-1]:.0f} experts resident LRU hits "
        f"{percent(half['lru'])}, the optimum {percent(half['optimum'])}",
        "Share of the experts needed that are found on the device. optimum: Belady's; static: the "
        "most popular of what came before, or in hindsight",
    )
    for column, name in _LINES:
        if known(table, column):
            line(made, size, numbers(table, column), name, ".3~%")
    line(made, size, numbers(table, "chance"), "by chance", ".3~%", line_dash="dash")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="experts of the layer that are resident")
    whole(made.layout.xaxis, len(size), 8)
    made.update_yaxes(title_text="hit rate", tickformat=".2~%", rangemode="tozero")
    return made
