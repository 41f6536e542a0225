"""Experts: which are hot, which are dead, and what one of them does."""

from __future__ import annotations

from functools import partial

import pandas as pd
import streamlit as st

from moe_lens.figures.load_heatmap import load_heatmap
from moe_lens.numbers import count
from moe_lens_dashboards.chosen import Chosen, chosen, ranked
from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.clicks import on_cell
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import show, sql
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.views.one_expert import one_expert

_MAP, _TABLE = "experts-map", "experts table"
_BESIDE, _BELOW = "experts beside the map", "expert below the map"
"""Fragments: choosing an expert draws these alone again."""
_LISTED = 1_000
"""Rows of the table: it goes to the browser whenever an expert is chosen on the map."""
_LEAST = 240
"""Pixels of the table's height; else it is as high as the map."""


def page(run: OpenRun) -> None:
    """Draw the page."""
    asked = run.ask("load_map")
    if not asked.table["routed"].sum() > 0:
        not_recorded(run, "rows in these steps")
        return
    figure = load_heatmap(asked.table)
    figure.update_layout(modebar_orientation="v")  # lying, it would cover cells
    left, right = st.columns([2, 1])
    with left, st.container(key=_MAP):
        show(figure, asked)
    with right:
        st.markdown("**Experts, the hottest first**")
        _table(run, height=max(_LEAST, figure.layout.height - 64))
    _chosen(run)
    _dead(run)


def _now(run: OpenRun) -> tuple[pd.DataFrame, Chosen]:
    """Every expert, the hottest first, and the chosen one."""
    experts = ranked(run.ask("load_map").table)
    return experts, chosen(experts, link.own("layer"), link.own("expert"))


@st.fragment(key=_BELOW)
def _chosen(run: OpenRun) -> None:
    experts, now = _now(run)
    on_cell(_MAP, (now.layer, now.expert), partial(_cell_taken, experts))
    if now.problem:
        st.warning(plain(now.problem), icon=":material/link_off:")
    one_expert(run, now)


@st.fragment(key=_BESIDE)
def _table(run: OpenRun, *, height: int) -> None:
    experts, now = _now(run)
    listed = experts[:_LISTED]
    of = "" if len(listed) == len(experts) else f" The first {_LISTED:,} of {count(len(experts))}."
    st.caption(f"Choose one here, or click on the map: it opens below.{of}")
    # Of what was chosen elsewhere, and of other rows after a filter changed.
    selected = st.session_state.get(_TABLE, {}).get("selection", {}).get("rows", [])
    rows = [now.row] if now.row < len(listed) else []
    if list(selected) != rows:
        st.session_state[_TABLE] = {"selection": {"rows": rows}}
    number = st.column_config.NumberColumn
    st.dataframe(
        listed,
        height=height,
        hide_index=True,
        key=_TABLE,
        on_select=partial(_row_taken, experts),
        selection_mode="single-row",
        column_config={
            "ratio": number("load / mean", format="%.2f×"),
            "routed": number("choices", format="localized"),
        },
    )


def _row_taken(experts: pd.DataFrame) -> None:
    rows = st.session_state[_TABLE]["selection"]["rows"]
    if rows and rows[0] < len(experts):
        layer, expert = experts[["layer", "expert"]].to_numpy()[rows[0]]
        _set(int(layer), int(expert))
        st.rerun(_BELOW)


def _cell_taken(experts: pd.DataFrame, layer: int, expert: int) -> None:
    if ((experts["layer"] == layer) & (experts["expert"] == expert)).any():
        _set(layer, expert)  # else a cell of the map without an expert
        st.rerun([_BELOW, _BESIDE])


def _set(layer: int, expert: int) -> None:
    link.set_own("layer", layer)
    link.set_own("expert", expert)


def _dead(run: OpenRun) -> None:
    st.subheader("Dead and dormant experts", anchor=False)
    asked, balance = run.ask("dead_experts"), run.ask("layer_balance").table
    unsure = balance[balance["dead_experts"].isna()]
    if asked.table.empty and len(unsure) < len(balance):
        st.success(
            "Every expert is chosen, and has at least 10 % of its fair share.",
            icon=":material/check_circle:",
        )
    elif not asked.table.empty:
        st.caption(
            "dead: no token chose it; dormant: it has less than 10 % of its fair share. "
            "Last step: when it was last chosen."
        )
        st.dataframe(
            asked.table.drop(columns=["run", "tokens", "tokens_needed"]),
            hide_index=True,
            column_config={
                "routed": st.column_config.NumberColumn("choices", format="localized"),
                "ratio": st.column_config.NumberColumn("load / mean", format="%.3f×"),
                "last_step": st.column_config.NumberColumn("last step", format="localized"),
            },
        )
    if len(unsure):
        needed = unsure["tokens_needed"].dropna()
        more = f" (it takes up to {count(needed.max())} each)" if len(needed) else ""
        st.info(
            f"{count(len(unsure))} of {count(len(balance))} layers have too few tokens to say "
            f"which of their experts are dead{more}.",
            icon=":material/info:",
        )
    sql(asked)
