"""What the routing of each layer costs on real kernels, beside its twins and the floor."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import numbers, one_run
from moe_lens.figures.heat import whole
from moe_lens.figures.layered import line
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent

_ENOUGH = 3
"""Forwards from which on a difference is called one, as `moe-lens replay` has it."""
_LINES = (
    ("p50_ms", "this routing"),
    ("balanced_ms", "balanced twin"),
    ("same_touched_ms", "balanced, same experts"),
    ("floor_ms", "floor"),
)


def replay_layers(table: pd.DataFrame) -> go.Figure:
    """Time of each layer: this routing, its balanced twins, the floor of this machine.

    Args:
        table: Answer of `replay_layers`. Of several results and phases, the first of each is drawn.
    """
    table = one_run(table)
    if not len(table):
        return blank(
            "Cost of the routing", "This run was not replayed yet: moe-lens replay measures it."
        )
    result, phase = table["result"].iloc[0], table["phase"].iloc[0]
    table = table[(table["result"] == result) & (table["phase"] == phase)]
    table = table.sort_values("layer").reset_index(drop=True)
    forwards = int(table["forwards"].max())
    made = figure(
        _title(table),
        f"{shown(phase, 40)}, {shown(result, 60)}: median over {forwards:,} forwards",
    )
    for column, name in _LINES:
        line(made, table["layer"], numbers(table, column), name, ",.3~r")
    made.update_traces(hovertemplate="%{y:,.3~r} ms")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="layer")
    whole(made.layout.xaxis, len(table))
    made.update_yaxes(title_text="ms per forward", rangemode="tozero")
    return made


def _title(table: pd.DataFrame) -> str:
    if table["forwards"].max() < _ENOUGH:
        return "Too few forwards to call a layer more or less than a balanced one"
    ratio = pd.Series(numbers(table, "over_balanced"))
    # Below the noise between two timings of the same work there is no difference to speak of.
    beyond = (ratio - 1).abs() - numbers(table, "noise")
    if not (beyond > 0).any():
        return "No layer costs more or less than a balanced one"
    at = int((ratio - 1).where(beyond > 0).abs().argmax())
    word = "more" if ratio[at] > 1 else "less"
    layer = table["layer"][at]
    return f"Layer {layer} costs {percent(abs(ratio[at] - 1))} {word} than a balanced one"
