"""One expert, opened: its load over time, its tags, positions, tokens and companions."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from moe_lens.figures.columns import known
from moe_lens.figures.expert_companions import expert_companions
from moe_lens.figures.expert_over_time import expert_over_time
from moe_lens.figures.expert_positions import expert_positions
from moe_lens.figures.expert_tags import expert_tags
from moe_lens.numbers import count, percent, times
from moe_lens_dashboards.chosen import Chosen
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.show import draw, show, sql

_MIN_TIMES = 5
"""Choices that a token id needs to be listed, where any has so many."""


def one_expert(run: OpenRun, now: Chosen) -> None:
    """Draw everything about the chosen expert."""
    where: dict[str, Any] = {"layer": now.layer, "expert": now.expert}
    st.subheader(f"Layer {now.layer}, expert {now.expert}", anchor=False)
    load = run.ask("expert_over_time", every=run.every(), **where)
    _tiles(now, load.table)
    left, right = st.columns(2)
    with left:
        show(expert_over_time(load.table), load, key="expert over time")
    with right:
        draw(run, expert_tags, "expert_tags", key="expert tags", **where)
    if not run.info.token_rows:
        st.markdown("**Positions, companions and tokens**")
        not_recorded(run, "token rows")
        return
    serves = run.ask("expert_serves", min_times=_MIN_TIMES, **where)
    left, right = st.columns(2)
    with left:
        show(expert_positions(serves.table), serves, key="expert positions")
    with right:
        draw(run, expert_companions, "expert_companions", key="companions", **where)
    _tokens(run, serves)


def _tiles(now: Chosen, load: pd.DataFrame) -> None:
    overflowed, dropped = (
        percent(int(load[name].sum()) / now.routed if now.routed and known(load, name) else None)
        for name in ("overflowed", "dropped")
    )
    shown = (
        ("Choices", count(now.routed), "Of this expert by valid tokens."),
        ("Load", times(now.ratio), "Over the mean expert of its layer (1: fair share)."),
        ("Place in its layer", f"{now.place}/{now.of}", "The hottest is first."),
        ("Overflowed", overflowed, "Of its choices: those that found it full."),
        ("Dropped", dropped, "Of its choices: those that no expert computed."),
    )
    for column, (label, value, help) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, help=help, border=True)


def _tokens(run: OpenRun, serves: Asked) -> None:
    st.markdown("**Tokens it serves**")
    kinds = serves.table["kind"]
    if not serves.table.loc[kinds == "position", "chosen"].sum():
        st.info("No token that was kept chose this expert.", icon=":material/info:")
        return
    ids = serves.table[kinds == "token id"]
    if ids.empty:
        not_recorded(run, "token ids")
        return
    least = min(_MIN_TIMES, ids["chosen"].min())
    st.caption(
        f"Token ids that it takes most of, of those that chose it {least} times or more. "
        "Lift: over its share of all tokens."
    )
    number = st.column_config.NumberColumn
    st.dataframe(
        ids[["value", "chosen", "tokens", "share", "lift"]],
        hide_index=True,
        column_config={
            "value": number("token id"),
            "chosen": number("chose it", format="localized"),
            "tokens": number("occurrences", format="localized"),
            "share": number("share", format="percent"),
            "lift": number("lift", format="%.2f×"),
        },
    )
    sql(serves)
