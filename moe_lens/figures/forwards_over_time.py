"""How fast forwards were, and when one was slow."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, mean, numbers, one_run
from moe_lens.figures.layered import line, steps
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import count


def forwards_over_time(table: pd.DataFrame) -> go.Figure:
    """Tokens per second in forwards, a line a phase.

    Args:
        table: Answer of `forwards_over_time`.
    """
    table = one_run(table)
    if not known(table, "tokens_per_second"):
        if len(table):
            return blank(
                "Speed over time",
                "The trace has no times of forwards.",
                "The trace has no times",
                lacks=("times",),
            )
        return blank("Speed over time", "No forward was recorded.")
    host, forwards = numbers(table, "host_ms"), numbers(table, "forwards")
    made = figure(
        f"{count(forwards.sum())} forwards, {_ms(mean(host, forwards))} each",
        "Valid tokens over the wall time of forwards on the host, of one rank",
    )
    for phase, rows in table.groupby("phase", sort=False):
        line(
            made,
            rows["step"],
            numbers(rows, "tokens_per_second"),
            shown(phase),
            ",.4~r",
            customdata=rows[["forwards", "tokens", "host_ms"]].to_numpy(float),
        )
    made.update_traces(
        hovertemplate="%{y:,.4~r} tokens/s (%{customdata[0]:,} forwards, "
        "%{customdata[1]:,} tokens, %{customdata[2]:.4~r} ms each)"
    )
    steps(made)
    made.update_layout(showlegend=table["phase"].nunique() > 1)
    made.update_yaxes(title_text="tokens per second", tickformat="~s", rangemode="tozero")
    return made


def _ms(value: float) -> str:
    return f"{value:,.3g} ms"
