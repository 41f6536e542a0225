"""Compare: two runs, or two windows of steps of one, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import streamlit as st

from moe_lens.figures.load_difference import load_difference
from moe_lens.numbers import count
from moe_lens.queries.imported import reasons
from moe_lens_dashboards.components.choose import choose
from moe_lens_dashboards.components.columns import number, share, whole
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.show import show, sql
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.differences import Answers, by_layer, hottest, shapes
from moe_lens_dashboards.views.two_sides import Side, two_sides

_HOTTEST = 10
_ORDERS = {"balance": "load balance", "dropped": "dropped choices", "entropy": "router entropy"}
_BALANCE = "Load of the hottest expert over the mean of its layer"
_ENTROPY = "Router entropy over its maximum: 0 is certain, 1 undecided"
_COLUMNS = {
    "layer": whole("layer"),
    "balance_a": number("balance A", 2, _BALANCE),
    "balance_b": number("balance B", 2, _BALANCE),
    "balance_change": number("change", 2, "B minus A"),
    "floor": number("by chance", 2, "What an unbiased router gives, on the side with fewer tokens"),
    "dropped_a": share("dropped A", "Choices that no expert computed, over all choices"),
    "dropped_b": share("dropped B", "Choices that no expert computed, over all choices"),
    "dropped_change": share("change ", "B minus A, in percentage points"),
    "entropy_a": number("entropy A", 3, _ENTROPY),
    "entropy_b": number("entropy B", 3, _ENTROPY),
    "entropy_change": number("change  ", 3, "B minus A"),
}


@dataclass(frozen=True)
class _Asked:
    balance: Asked
    dropped: Asked
    router: Asked
    load: Asked

    @property
    def answers(self) -> Answers:
        return Answers(self.balance.table, self.dropped.table, self.router.table)

    @property
    def tokens(self) -> int:
        """Valid tokens in the layer that saw most."""
        return int(self.dropped.table["tokens"].max())


def page(run: OpenRun) -> None:
    """Draw the page."""
    sides = two_sides(run)
    if sides is None:
        return
    asked = (_ask(sides[0].run), _ask(sides[1].run))
    for side, each in zip(sides, asked, strict=True):
        if not each.load.table["routed"].sum() > 0:
            st.markdown(f"**{side.letter}: {plain(side.name)}**")
            not_recorded(run, "rows in these steps")
            return
    _heading(sides, asked)
    a, b = asked
    named = (f"A: {sides[0].name}", f"B: {sides[1].name}")
    show(load_difference(a.load.table, b.load.table, names=named), a.load, b.load)
    st.subheader("Layer by layer", anchor=False)
    order = choose(
        "by", "Largest change first of", list(_ORDERS), "balance", words=_ORDERS.__getitem__
    )
    found = by_layer(a.answers, b.answers, order)
    # A column with nothing in it is what neither side holds; why stands below.
    st.dataframe(
        found.dropna(axis=1, how="all"), column_config=_COLUMNS, hide_index=True, height="auto"
    )
    _unknown(sides, found)
    sql(a.balance, b.balance, a.dropped, b.dropped, a.router, b.router)
    st.subheader("Hottest experts", anchor=False)
    left, right = st.columns(2)
    with left:
        _hottest(sides[0], a.load.table, b.load.table, "in B")
    with right:
        _hottest(sides[1], b.load.table, a.load.table, "in A")


def _ask(run: OpenRun) -> _Asked:
    return _Asked(
        balance=run.ask("layer_balance"),
        dropped=run.ask("dropped_tokens", by_tag=False),
        router=run.ask("router_confidence", by_tag=False),
        load=run.ask("load_map"),
    )


def _heading(sides: tuple[Side, Side], asked: tuple[_Asked, _Asked]) -> None:
    for column, side, each in zip(st.columns(2), sides, asked, strict=True):
        info = side.run.info
        column.markdown(f"**{side.letter}: {plain(side.name)}**")
        column.caption(plain(f"{info.model} · {info.shape} · {count(each.tokens)} tokens"))
    for sentence in shapes(sides[0].run.info, sides[1].run.info):
        st.warning(plain(sentence), icon=":material/difference:")


def _unknown(sides: tuple[Side, Side], found: pd.DataFrame) -> None:
    """Say of each side what its table holds nothing of, where it was imported."""
    for side, end in zip(sides, "ab", strict=True):
        of = reasons(side.run.info)
        for measure, field in (("dropped", "dropped_tokens"), ("entropy", "router_confidence")):
            if field in of and found[f"{measure}_{end}"].isna().all():
                st.caption(plain(f"{side.letter}: {of[field]}."))


def _hottest(side: Side, here: pd.DataFrame, there: pd.DataFrame, other: str) -> None:
    st.markdown(f"**{side.letter}: {plain(side.name)}**")
    st.dataframe(
        hottest(here, there, _HOTTEST),
        column_config={
            "layer": whole("layer"),
            "expert": whole("expert"),
            "ratio": number("load / mean", 2),
            "other": number(other, 2),
        },
        hide_index=True,
    )
