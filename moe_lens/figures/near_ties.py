"""How many tokens were nearly routed elsewhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run
from moe_lens.figures.heat import amounts, heat
from moe_lens.figures.theme import AMOUNT, figure
from moe_lens.numbers import count, percent

NEAR = 1e-3
"""The title names the share of tokens with a smaller margin."""


def near_ties(table: pd.DataFrame) -> go.Figure:
    """The distribution of the margin between the last expert chosen and the next, by layer.

    Args:
        table: Answer of `near_ties`.
    """
    table = one_run(table)
    if not known(table, "tokens"):
        return blank(
            "Near ties",
            "No margins were recorded: they stand in per-token rows (record(..., tokens=...)), "
            "and some routers have none.",
            "No margins",
            lacks=("entropy",),
        )
    table = table.assign(low=numbers(table, "low"), high=numbers(table, "high"))
    bins = sorted(set(zip(table["low"], table["high"].fillna(np.inf), strict=True)))
    place = {low: i for i, (low, _) in enumerate(bins)}
    tokens = numbers(table, "tokens")
    near = tokens[(table["low"] < NEAR).to_numpy()].sum() / tokens.sum()
    made = figure(
        f"{percent(near)} of {count(tokens.sum())} token-layers have a margin below {NEAR:g}",
        "k-th minus next selection score, share of each layer's kept tokens",
    )
    layers = sorted(table["layer"].unique())
    cells = pd.DataFrame(0.0, layers, range(len(bins)))
    seen = pd.DataFrame(0, layers, range(len(bins)))
    for layer, low, share, n in zip(
        table["layer"], table["low"], numbers(table, "share"), tokens, strict=True
    ):
        cells.loc[layer, place[low]] = share
        seen.loc[layer, place[low]] = int(n)
    decades = {i: round(np.log10(low)) for i, (low, _) in enumerate(bins) if _is_decade(low)}
    words = [_words(low, high) for low, high in bins]
    heat(
        made,
        cells,
        AMOUNT,
        hovertemplate="layer %{y}, margin %{customdata[1]}<br><b>%{z:.2%}</b>: "
        "%{customdata[0]:,} tokens",
        customdata=[[[int(n), words[i]] for i, n in enumerate(row)] for row in seen.to_numpy()],
    )
    made.update_xaxes(
        title_text="margin (unit of the selection score)",
        tickmode="array",
        tickvals=[i - 0.5 for i in decades],
        ticktext=[f"10<sup>{decades[i]}</sup>" for i in decades],
    )
    made.update_yaxes(title_text="layer")
    made.update_layout({AMOUNT: amounts("share of tokens", cells.to_numpy().max(), ".2~%")})
    return made


def _is_decade(low: float) -> bool:
    return low > 0 and abs(np.log10(low) - round(np.log10(low))) < 1e-6


def _words(low: float, high: float) -> str:
    if not np.isfinite(high):
        return f"{low:.2g} or more"
    return f"{low:.2g} to {high:.2g}"
