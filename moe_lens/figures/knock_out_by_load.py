"""What experts are worth, beside how much they are used."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moe_lens.figures.blank import blank
from moe_lens.figures.columns import known, numbers, one_run, top
from moe_lens.figures.theme import figure
from moe_lens.numbers import decimal, digits, percent

_NAMED = 3
"""So many of the dearest experts have their number beside them, and all dormant but causal ones."""
_KINDS = {  # how each is marked
    "expert": ("circle", 8),
    "dormant": ("circle-open", 8),
    "dormant but causal": ("diamond", 12),
}


def knock_out_by_load(table: pd.DataFrame) -> go.Figure:
    """Cost of knocking each expert of a layer out, over the share of tokens that choose it.

    Args:
        table: Answer of `expert_importance`, of one layer.
    """
    table = one_run(table)
    if not known(table, "knock_out"):
        return blank(
            "What experts are worth",
            "No expert was knocked out: moe-lens counterfactual does so unless its experts are "
            "all in use by every token.",
        )
    most = top(table, "knock_out")
    place = 1 + int((numbers(table, "load") > most["load"]).sum())
    made = figure(
        f"Expert {most['expert']} costs most to lose: {digits(most['knock_out'])}; by load it is "
        f"number {place} of {len(table)} measured",
        _agree(table),
    )
    kind_E = np.where(
        _flags(table, "dormant_but_causal"),
        "dormant but causal",
        np.where(_flags(table, "dormant"), "dormant", "expert"),
    )
    dearest = set(table.sort_values("knock_out", ascending=False)["expert"].head(_NAMED))
    named = np.equal(kind_E, "dormant but causal") | table["expert"].isin(dearest).to_numpy()
    table = table.assign(kind=kind_E, name=np.where(named, table["expert"].astype(str), ""))
    # Those further left have their number on the left, so that neighbours' do not overlap.
    turn = table[named].sort_values("load")["expert"].tolist()
    left = set(turn[: (len(turn) + 1) // 2]) if len(turn) > 1 else set()
    table["side"] = np.where(table["expert"].isin(left), "middle left", "middle right")
    for kind, (symbol, size) in _KINDS.items():
        _marks(made, table[table["kind"] == kind], kind, symbol, size)
    fair = numbers(table, "fair")
    if np.isfinite(fair).any():
        at = float(np.nanmean(fair))
        made.add_vline(x=at)
        made.add_annotation(x=at, y=1, yref="paper", text="even load", xanchor="left", xshift=4)
    made.add_hline(y=0)
    made.update_xaxes(
        title_text="share of tokens that choose it", tickformat=".2~%", rangemode="tozero"
    )
    made.update_yaxes(title_text="cost of knocking it out (loss)", tickformat=".3~g")
    made.update_layout(
        showlegend=len(set(kind_E)) > 1,
        legend={"orientation": "h", "y": 1.06, "yanchor": "bottom"},
    )
    return made


def _marks(made: go.Figure, rows: pd.DataFrame, kind: str, symbol: str, size: int) -> None:
    if rows.empty:
        return
    made.add_scatter(
        x=numbers(rows, "load"),
        y=numbers(rows, "knock_out"),
        error_y={
            "type": "data",
            "array": numbers(rows, "knock_out_error"),
            "thickness": 1,
            "width": 0,
        },
        mode="markers+text",
        marker={"symbol": symbol, "size": size},
        name=kind,
        text=rows["name"].tolist(),
        textposition=rows["side"].tolist(),
        textfont_size=11,
        cliponaxis=False,
        customdata=np.stack(
            [
                rows["expert"].astype(object),
                [decimal(v, 4) for v in numbers(rows, "knock_out_error")],
                [decimal(v, 4) for v in numbers(rows, "knock_out_used")],
                [decimal(v, 4) for v in numbers(rows, "force_in")],
            ],
            -1,
        ),
        hovertemplate="<b>expert %{customdata[0]}</b>, %{x:.2~%} of tokens<br>"
        "knocked out %{y:.4~f} ± %{customdata[1]}<br>over tokens that chose it %{customdata[2]}<br>"
        f"forced in %{{customdata[3]}}<extra>{kind}</extra>",
    )


def _flags(table: pd.DataFrame, column: str) -> NDArray[np.bool_]:
    return np.equal(numbers(table, column), 1)


def _agree(table: pd.DataFrame) -> str:
    """How alike load and cost order the experts."""
    causal = int(_flags(table, "dormant_but_causal").sum())
    parts = [f"{causal} of {len(table)} are dormant but causal"] if causal else []
    ranks = pd.DataFrame({name: numbers(table, name) for name in ("load", "knock_out")}).rank()
    if len(table) > 2 and (ranks.nunique() > 1).all():
        alike = float(ranks["load"].corr(ranks["knock_out"]))
        parts.append(f"rank correlation of load and cost {decimal(alike)}")
    fair = percent(float(np.nanmean(numbers(table, "fair")))) if known(table, "fair") else ""
    if fair:
        parts.append(f"K / E is {fair}")
    text = "; ".join(parts) or "Mean over all tokens of the loss without it, minus the loss with it"
    return text[0].upper() + text[1:]
