"""Router: how sure it is, how large its logits are, and how near its decisions are to others."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from moe_lens.figures.columns import known, mean, numbers
from moe_lens.figures.entropy_by_layer import entropy_by_layer
from moe_lens.figures.near_ties import near_ties
from moe_lens.figures.repetition import repetition
from moe_lens.figures.router_over_time import VALUES, router_over_time
from moe_lens.lacking import not_there
from moe_lens.numbers import NONE, count, decimal
from moe_lens_dashboards.components import columns
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.show import draw, show, sql
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.no_number import without


def page(run: OpenRun) -> None:
    """Draw the page."""
    asked = run.ask("router_confidence", by_tag=False)
    table = asked.table
    if not table["tokens"].sum() + table["nonfinite_tokens"].sum() > 0:
        not_recorded(run, "rows in these steps")
        return
    units = {x.layer: x.selection for x in run.info.layers}
    unseen = bool(run.info.imported) and not known(table, "entropy_norm")
    _tiles(table, {units.get(layer) for layer in table["layer"]}, unseen=unseen)
    sql(asked)
    rows = [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]
    for sentence in without(run.info.layers, rows, not_there(run.info, "entropy")):
        st.info(plain(sentence), icon=":material/info:")
    _charts(run, [value for value in VALUES if known(table, value)])
    _groups(run)
    if not run.info.token_rows:
        st.markdown("**Near ties, and repetition between consecutive tokens**")
        not_recorded(run, "token rows")
        return
    margins = draw(run, near_ties, "near_ties")
    if len(margins) or not run.info.imported:
        st.caption(
            "A margin is the k-th minus the next selection score. Other kernels, or another "
            "precision, flip tokens whose margin is about their arithmetic difference."
        )


def _charts(run: OpenRun, values: list[str]) -> None:
    """Two columns: what is known of the routers' scores, and repetition where rows were kept."""
    over_time = run.ask("router_over_time", every=run.every())
    charts = [partial(_over_time, over_time, value) for value in values]
    if "entropy_norm" in values:
        charts.insert(0, partial(_drawn, run, entropy_by_layer, "router_confidence"))
    if run.info.token_rows:
        charts.append(partial(_drawn, run, repetition, "repetition"))
    sides = st.columns(2)
    for i, chart in enumerate(charts):
        with sides[i % 2]:
            chart()


def _groups(run: OpenRun) -> None:
    """Where routers choose among groups of experts first: how open each of the two choices is."""
    asked = run.ask("group_entropy")
    if asked.table.empty:
        return
    st.markdown("**Groups of experts**")
    st.caption(
        "H(e) = H(g) + H(e|g), nats: what is open of a token's expert is what is open of its "
        f"group, and of the expert inside the group. {plain(run.info.grouped)}."
    )
    shown = {
        "layer": columns.whole("layer"),
        "tokens": columns.whole("tokens"),
        "token_entropy": columns.number("H(e)", help="Of the router's distribution, per token."),
        "token_group": columns.number("H(g)"),
        "token_within": columns.number("H(e|g)"),
        "load_entropy": columns.number("load H(e)", help="Of the choices of all tokens together."),
        "load_group": columns.number("load H(g)"),
        "load_within": columns.number("load H(e|g)"),
    }
    st.dataframe(asked.table[list(shown)], hide_index=True, column_config=shown)
    sql(asked)


def _over_time(asked: Asked, value: str) -> None:
    show(router_over_time(asked.table, value), asked)


def _drawn(run: OpenRun, figure: Callable[..., go.Figure], question: str) -> None:
    draw(run, figure, question)


def _tiles(table: pd.DataFrame, units: set[str | None], *, unseen: bool) -> None:
    def of(column: str) -> float | None:
        found = mean(numbers(table, column), numbers(table, "tokens"))
        return None if math.isnan(found) else found

    zloss, unit = of("zloss"), " or ".join(sorted(filter(None, units)))
    shown = (
        ("Router entropy", decimal(of("entropy_norm")), "Over its maximum ln E."),
        (
            "Margin",
            _short(of("margin")),
            "k-th minus next selection score" + (f", of {plain(unit)}." if unit else "."),
        ),
        ("Top-1 probability", decimal(of("top1_prob")), "Largest router probability."),
        (
            "Logit scale",
            NONE if zloss is None else decimal(math.sqrt(zloss)),
            "Root of the z-loss: root mean square of the logsumexp of the logits, nats.",
        ),
        (
            "Tokens not finite",
            NONE if unseen else count(int(table["nonfinite_tokens"].sum())),
            "Tokens with NaN or infinite logits, summed over layers: in no mean.",
        ),
    )
    for column, (label, value, help) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, help=help, border=True)


def _short(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"
