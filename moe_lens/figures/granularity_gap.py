"""How far imitations with fewer experts a token are off."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line, logarithmic
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import digits


def granularity_gap(table: pd.DataFrame) -> go.Figure:
    """Error over the experts that a student uses a token, a line a teacher, beside an affine map.

    Args:
        table: A row a student of equal active parameters: `teacher`, `teacher_top_k`, `top_k`,
            `nmse`, `affine_nmse`; `published` where the paper has the number.
    """
    table = one_run(table)
    if not known(table, "nmse"):
        return blank("Students that use fewer experts", "No student has been trained.")
    table = table.sort_values(["teacher_top_k", "top_k"])
    top_k = numbers(table, "top_k")
    low, high = table.iloc[int(top_k.argmin())], table.iloc[int(top_k.argmax())]
    made = figure(
        f"A student with {low['top_k']:.0f} of its experts a token is off by "
        f"{digits(low['nmse'])}, with {high['top_k']:.0f} by {digits(high['nmse'])}",
        "Squared error over that of predicting zero; all students have the same active parameters",
    )
    teachers = list(table.groupby("teacher", sort=False))
    for name, of in teachers:
        line(made, numbers(of, "top_k"), numbers(of, "nmse"), f"of {shown(name)}", ".3~g")
        if known(of, "published"):
            published = numbers(of, "published")
            line(made, numbers(of, "top_k"), published, f"of {shown(name)}, the author's", ".3~g",
                 line_dash="dot")  # fmt: skip
    if len(teachers) == 1 and known(table, "affine_nmse"):
        affine = numbers(table, "affine_nmse")
        line(made, numbers(table, "top_k"), affine, "best affine map", ".3~g", line_dash="dash")
    made.update_xaxes(title_text="experts a student uses a token (k)", type="log", dtick=0.30103)
    made.update_yaxes(title_text="error (1: predicting zero)", tickformat=".3~g")
    drawn = [name for name in ("nmse", "published", "affine_nmse") if known(table, name)]
    logarithmic(made, [numbers(table, name) for name in drawn])
    made.update_layout(hovermode="x unified")
    return made
