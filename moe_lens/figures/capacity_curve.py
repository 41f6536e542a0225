"""What another capacity factor would drop."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, means, numbers, one_run
from moe_lens.figures.layered import layered, line
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

KEPT = 0.01
"""The title names the smallest capacity factor that drops less than this share."""


def capacity_curve(table: pd.DataFrame, recorded: float | None = None) -> go.Figure:
    """Dropped share over capacity factors, of all layers together and one by one.

    Args:
        table: Answer of `capacity_sweep`.
        recorded: The capacity factor that was in force, to be marked.
    """
    table = one_run(table)
    if not known(table, "dropped_share"):
        return blank(
            "What another capacity would drop",
            "Nothing to sweep: these layers have no counts of single forwards "
            "and no per-token rows (record(..., tokens=...) keeps them).",
            "Nothing to sweep: no counts of single forwards, and no per-token rows",
            lacks=("tokens",),
        )
    overall = means(table, "capacity_factor", "dropped_share", "choices").dropna()
    enough = overall[overall < KEPT]
    title = (
        f"A capacity factor of {enough.index[0]:.3g} would drop {percent(enough.iloc[0])}"
        if len(enough)
        else f"Even a capacity factor of {overall.index[-1]:.3g} "
        f"would drop {percent(overall.iloc[-1])}"
    )
    made = figure(title, _source(table))
    worst = means(table, "layer", "dropped_share", "choices").idxmax()
    layered(made, table, "capacity_factor", "dropped_share", worst, form=".3~%")
    if table["layer"].nunique() > 1:
        line(made, overall.index, overall, "all layers", ".3~%", line_width=3, line_dash="dash")
    if recorded is not None:
        made.add_vline(x=recorded)
        made.add_annotation(
            x=recorded,
            y=1,
            yref="paper",
            text=f"recorded: {recorded:.3g}",
            xanchor="left",
            xshift=4,
        )
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="capacity factor (slots over choices)", hoverformat=".3~f")
    made.update_yaxes(title_text="dropped share of choices", tickformat=".2~%", rangemode="tozero")
    return made


def _source(table: pd.DataFrame) -> str:
    kinds = set(table["source"])
    text = {
        frozenset(["counts"]): "From the counts of every forward",
        frozenset(["rows"]): "From kept per-token rows",
    }.get(frozenset(kinds), "From counts, and from per-token rows where forwards share counts")
    covered = numbers(table, "covered")
    if covered.size and covered.min() < 0.9995:
        text += f"; stands on {percent(float(covered.min()))} of a layer's choices at least"
    return text
