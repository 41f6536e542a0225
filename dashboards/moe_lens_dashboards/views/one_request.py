"""One sequence: the experts that it used, and its tokens one by one. A part of Requests."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from moe_lens.figures.request_load import request_load
from moe_lens.numbers import count, decimal, percent
from moe_lens_dashboards.components.columns import number, text, whole
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import draw, sql
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.sequence import LOST, token_table

_TOKENS = 2_000
"""Tokens that the table shows; the SQL gives all."""


def one_request(run: OpenRun, rank: int, sequence: int, said: pd.Series[Any] | None) -> None:
    """Draw it.

    Args:
        run: The run.
        rank: Of the sequence.
        sequence: Its number.
        said: Its row of `requests`, where the table has it.
    """
    asked = run.ask("request_tokens", rank=rank, sequence=sequence)
    with st.container(border=True):
        st.subheader(f"Sequence {sequence}", anchor=False)
        if asked.table.empty:
            st.info(
                f"No token of sequence {sequence} of rank {rank} is within the filters.",
                icon=":material/info:",
            )
            return
        if said is not None:
            _facts(said)
        draw(run, request_load, "request_load", rank=rank, sequence=sequence)
        _tokens(asked.table)
        sql(asked)
        if asked.table["token_id"].isna().all():
            not_recorded(run, "token ids")


def _facts(said: pd.Series[Any]) -> None:
    words = [f"rank {said['rank']}", f"tag {said['tag']}", f"from step {said['first_step']:,}"]
    if isinstance(said["request"], str):
        words.insert(0, f"request {said['request']}")
    st.caption(plain(" · ".join(words)))
    shown = (
        ("Tokens", count(said["tokens"])),
        ("Experts used", count(said["experts_used"])),
        ("Dropped choices", percent(said["dropped_rate"])),
        ("Unserved tokens", percent(said["unserved_rate"])),
        ("Loss", decimal(said["loss"], 3)),
    )
    for column, (label, value) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, border=True)


def _tokens(rows: pd.DataFrame) -> None:
    st.markdown("**Its tokens, with their experts by layer**")
    table = token_table(rows, _TOKENS)
    lost = f"{LOST}: the expert was full, and the choice dropped. "
    lost *= bool(rows["dropped"].notna().any())
    more = f"The first {count(_TOKENS)}; the SQL gives all. " if len(table) == _TOKENS else ""
    st.caption(f"{lost}{more}Positions count from 0.")
    columns = {
        "position": whole("position"),
        "token_id": whole("token id"),
        "loss": number("loss"),
        "dropped": whole("dropped"),
    }
    missing = {c for c in ("token_id", "loss") if table[c].isna().all()}
    layers = [c for c in table.columns if c not in columns]
    st.dataframe(
        table,
        column_order=[c for c in columns if c not in missing] + layers,
        column_config={**columns, **{c: text(c) for c in layers}},
        hide_index=True,
        height=min(38 + 35 * len(table), 420),
    )
