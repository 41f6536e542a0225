"""Whether tokens that lost a choice are predicted worse."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moe_lens.figures.bars import labels
from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, mean, numbers, one_run
from moe_lens.figures.dots import dots
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal


def quality_of_dropped(table: pd.DataFrame) -> go.Figure:
    """Loss of tokens with and without a dropped choice, two dots a tag, with standard errors.

    Args:
        table: Answer of `quality_of_dropped`.
    """
    table = one_run(table)
    if not known(table, "loss"):
        return blank(
            "Loss of dropped tokens",
            "Nothing of this was recorded: it takes per-token rows (record(..., tokens=...)) "
            "and losses by position (rec.loss).",
            "No losses of single tokens",
            lacks=("losses",),
        )
    lost = table["dropped"].astype(bool).to_numpy()
    if not lost.any():
        return blank("Loss of dropped tokens", "No kept token with a loss had a choice dropped.")
    tags = list(dict.fromkeys(table["tag"]))
    place = {tag: i for i, tag in enumerate(tags)}
    made = figure(_title(table, lost), "Mean loss per token, with its standard error")
    for kind, rows in (("kept", table[~lost]), ("some choice dropped", table[lost])):
        dots(
            made,
            [place[tag] for tag in rows["tag"]],
            numbers(rows, "loss"),
            list(rows["tag"]),
            kind,
            f"{kind}: %{{x:.4~f}} over %{{customdata:,}} tokens",
            numbers(rows, "tokens"),
            numbers(rows, "loss_se"),
        )
    labels(made, tags)
    made.update_yaxes(showgrid=True)
    made.update_xaxes(title_text="loss per token (unit given to rec.loss)")
    return made


def _title(table: pd.DataFrame, lost: NDArray[np.bool_]) -> str:
    """Compare tag by tag, weighed by the dropped tokens: tags differ in loss and in drops."""
    wide = table.assign(lost=lost).pivot(index="tag", columns="lost", values=["loss", "tokens"])
    if True not in wide["loss"] or False not in wide["loss"]:
        return "Loss of tokens with a dropped choice"
    difference = (wide["loss"][True] - wide["loss"][False]).to_numpy(float)
    weight = wide["tokens"][True].to_numpy(float)
    by = mean(difference, weight)
    if by != by:
        return "Loss of tokens with a dropped choice"
    way = "higher" if by >= 0 else "lower"
    return f"Within a tag, loss is {decimal(abs(by), 3)} {way} where a choice was dropped"
