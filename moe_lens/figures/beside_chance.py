"""A metric of every layer beside what chance gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import Floats, known, numbers, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import band, line
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, digits


def beside_chance(
    table: pd.DataFrame, metric: str = "", unit: str = "value", subtitle: str = ""
) -> go.Figure:
    """Draw a metric by layer, with the range of its draws by chance where it has one.

    Args:
        table: A row a layer: `layer`, `value`, `chance`, `low`, `high` (null: nothing was drawn).
        metric: What it is called.
        unit: Of the value.
        subtitle: What it tells.
    """
    table = one_run(table)
    if not known(table, "value"):
        return blank(metric or "Beside chance", "No layer has a number for this metric.")
    table = table[table["value"].notna()].sort_values("layer")
    value, high = numbers(table, "value"), numbers(table, "high")
    made = figure(f"{metric}: {_found(table, value, high)}".removeprefix(": "), subtitle)
    line(made, table["layer"], value, "measured", ".4~g")
    if known(table, "high"):
        low = numbers(table, "low")
        band(made, table["layer"], low, high, "draws by chance", ".4~g")
    if known(table, "chance"):
        line(made, table["layer"], numbers(table, "chance"), "by chance", ".4~g", line_dash="dot")
    made.update_xaxes(title_text="layer")
    whole(made.layout.xaxis, len(table))
    made.update_yaxes(title_text=unit)
    made.update_layout(hovermode="x unified")
    return made


def _found(table: pd.DataFrame, value: Floats, high: Floats) -> str:
    at = int(np.argmax(value))
    most = f"{digits(float(value[at]))} in layer {table['layer'].iloc[at]}"
    if np.isnan(high).all():
        return most
    low = numbers(table, "low")
    beyond = int(((value > high) | (value < low)).sum())
    return f"{most}; beyond chance in {count(beyond)} of {count(len(value))} layers"
