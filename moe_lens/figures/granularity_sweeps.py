"""Whether wider or more experts make up for fewer of them a token."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import line
from moe_lens.figures.theme import figure
from moe_lens.numbers import digits

_WHAT = {"width": "wider experts", "experts": "more experts"}


def granularity_sweeps(table: pd.DataFrame) -> go.Figure:
    """Error over a factor of size, k kept: a line for width and one for the number of experts.

    Args:
        table: A row a student: `swept` ("width" or "experts"), `top_k`, `factor`, `nmse`,
            `affine_nmse`; `published` where the paper has the number.
    """
    table = one_run(table)
    if not known(table, "nmse"):
        return blank("Wider and more experts", "No student of another size has been trained.")
    most = table.iloc[int(np.nanargmax(numbers(table, "factor")))]
    best = float(np.nanmin(numbers(table, "nmse")))
    made = figure(
        f"Students up to {most['factor']:.0f} times as large are off by {digits(best)} at best",
        "Squared error over that of predicting zero; the experts used a token stay the same",
    )
    for (swept, top_k), of in table.sort_values("factor").groupby(["swept", "top_k"], sort=False):
        name = f"k = {top_k}, {_WHAT[str(swept)]}"
        line(made, numbers(of, "factor"), numbers(of, "nmse"), name, ".3~g")
        if known(of, "published"):
            line(made, numbers(of, "factor"), numbers(of, "published"), f"{name}, the author's",
                 ".3~g", line_dash="dot")  # fmt: skip
    if known(table, "affine_nmse"):
        factors = np.unique(numbers(table, "factor"))
        affine = np.full(len(factors), np.nanmean(numbers(table, "affine_nmse")))
        line(made, factors, affine, "best affine map", ".3~g", line_dash="dash")
    made.update_xaxes(title_text="times the size", type="log", dtick=0.30103)
    made.update_yaxes(title_text="error (1: predicting zero)", rangemode="tozero")
    made.update_layout(hovermode="x unified")
    return made
