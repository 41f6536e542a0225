"""How routing changes where the same content stands elsewhere, by the distance from the cut."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.layered import layered
from moe_lens.figures.theme import figure
from moe_lens.numbers import percent


def order_change(table: pd.DataFrame) -> go.Figure:
    """Share of tokens whose set of experts changed, over tokens since the cut, layer by layer.

    Args:
        table: `by_distance` of `moe_lens.queries.paired.paired`.
    """
    table = one_run(table)
    if not known(table, "set_changed"):
        return blank(
            "The same content in another order",
            "No prompts are paired: record(..., keys=['pair'], token_ids=True) and "
            "rec.step(keys=...) say which belong together.",
            "No prompts are paired",
        )
    by_place = table.assign(
        all=numbers(table, "set_changed") * numbers(table, "tokens"),
        set_changed=numbers(table, "set_changed"),
        tokens=numbers(table, "tokens"),
    )
    sums = by_place.groupby("first")[["all", "tokens"]].sum()
    share = sums["all"] / sums["tokens"]
    last = by_place.groupby("layer")["set_changed"].mean().idxmax()
    made = figure(
        f"After a cut {percent(float(share.iloc[0]))} of the tokens change their experts, "
        f"{share.index[-1]:.0f} tokens further on {percent(float(share.iloc[-1]))}",
        "Share of tokens whose set of experts is another one where the same content stands in "
        "another order; a router that sees token ids alone changes nothing",
    )
    layered(made, by_place, "first", "set_changed", last, form=".3~%")
    made.update_layout(hovermode="x unified")
    made.update_xaxes(title_text="tokens since the cut (from 0, 1, 2, 4, 8, … on)")
    made.update_yaxes(title_text="tokens with another set", tickformat=".2~%", range=[0, 1.02])
    return made
