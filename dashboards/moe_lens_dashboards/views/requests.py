"""Requests: what each kind of request, and each sequence, used, lost and cost."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import streamlit as st

from moe_lens.figures.quality_of_dropped import quality_of_dropped
from moe_lens.numbers import count
from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.columns import number, share, text, whole
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import draw, sql
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.views.one_request import one_request

_ORDERS = {"dropped": "dropped choices", "loss": "loss", "tokens": "tokens"}
_SHOWN = 200
_RATES = {
    "dropped_rate": share("dropped", "Choices that no expert computed, over all choices"),
    "unserved_rate": share("unserved", "Tokens that no expert served, mean over layers"),
    "loss": number("loss", help="Mean per token, in the unit given to rec.loss"),
}
_TAGS = {
    "tag": text("tag"),
    "tokens": whole("tokens"),
    "loss_tokens": whole("tokens with a loss"),
    **_RATES,
    "entropy_norm": number("router entropy", help="Over its maximum: 0 is certain, 1 undecided"),
}
_SEQUENCES = {
    "rank": whole("rank"),
    "sequence": whole("sequence"),
    "request": text("request"),
    "tag": text("tag"),
    "first_step": whole("first step"),
    "tokens": whole("tokens"),
    "experts_used": whole("experts used", "Pairs of layer and expert that its tokens chose"),
    **_RATES,
}


def page(run: OpenRun) -> None:
    """Draw the page."""
    losses = _tags(run)
    if run.info.token_rows == 0:
        not_recorded(run, "token rows")
        return
    _sequences(run)
    st.subheader("Are tokens predicted worse that lost a choice?", anchor=False)
    if losses:
        draw(run, quality_of_dropped, "quality_of_dropped")
    else:
        not_recorded(run, "loss")


def _tags(run: OpenRun) -> bool:
    """Draw the totals by tag; whether a loss is among them."""
    st.subheader("By tag", anchor=False)
    asked = run.ask("quality_by_tag")
    if asked.table.empty:
        not_recorded(run, "rows in these steps")
        return False
    shown = _known(run, asked.table, _TAGS)
    st.dataframe(asked.table, column_order=shown, column_config=_TAGS, hide_index=True)
    sql(asked)
    return bool(asked.table["loss"].notna().any())


def _sequences(run: OpenRun) -> None:
    st.subheader("Sequences whose tokens were kept", anchor=False)
    orders = [name for name in _ORDERS if name == "tokens" or not run.info.imported]
    order = choose("order", "Most first", orders, orders[0], words=_ORDERS.__getitem__)
    asked = run.ask("requests", order=order, top=_SHOWN)
    table = asked.table
    if table.empty:
        not_recorded(run, "rows in these steps")
        return
    many = f"The first {count(_SHOWN)}. " if len(table) == _SHOWN else ""
    st.caption(f"{many}Choose a row to see its experts and tokens.")
    _table(run, table, f"requests {asked.parameters}")
    sql(asked)
    if chosen := _chosen():
        mine = table[(table["rank"] == chosen[0]) & (table["sequence"] == chosen[1])]
        one_request(run, *chosen, None if mine.empty else mine.iloc[0])


def _table(run: OpenRun, table: pd.DataFrame, key: str) -> None:
    """The sequences; that of the link is the chosen row, and the other way round."""
    names = [
        f"{rank}:{sequence}"
        for rank, sequence in zip(table["rank"], table["sequence"], strict=True)
    ]
    now = link.own("sequence")
    rows = [names.index(now)] if now in names else []
    held = st.session_state.get(key)
    if held is None or list(held["selection"]["rows"]) != rows:
        st.session_state[key] = {"selection": {"rows": rows}}
    # Columns that say nothing here: one rank, no request ids.
    same = {c for c in ("rank", "request") if table[c].nunique() <= (c == "rank")}
    st.dataframe(
        table,
        column_order=[c for c in _known(run, table, _SEQUENCES) if c not in same],
        column_config=_SEQUENCES,
        hide_index=True,
        height=min(38 + 35 * len(table), 320),
        key=key,
        on_select=lambda: _open(key, names),
        selection_mode="single-row",
    )


def _known(run: OpenRun, table: pd.DataFrame, columns: Iterable[str]) -> list[str]:
    """Without losses and shares of what was dropped, where an imported trace has none."""
    if not run.info.imported or table.empty:
        return list(columns)
    return [c for c in columns if c != "loss_tokens" and table[c].notna().any()]


def _open(key: str, names: list[str]) -> None:
    rows = st.session_state[key]["selection"]["rows"]
    link.set_own("sequence", names[rows[0]] if rows else None)


def _chosen() -> tuple[int, int] | None:
    given = link.own("sequence")
    if given is None:
        return None
    parts = given.split(":")
    if len(parts) == 2 and all(p.isascii() and p.isdigit() and len(p) < 16 for p in parts):
        return int(parts[0]), int(parts[1])
    st.warning(
        plain(f"sequence={given} in the link is no rank:sequence: left out."),
        icon=":material/link_off:",
    )
    link.set_own("sequence", None)
    return None
