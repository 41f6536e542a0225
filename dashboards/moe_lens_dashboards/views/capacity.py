"""Capacity: where choices overflow and are dropped, and what another capacity would drop."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import streamlit as st

from moe_lens.figures.capacity_curve import capacity_curve
from moe_lens.figures.drops_by_layer import drops_by_layer
from moe_lens.figures.drops_by_tag import drops_by_tag
from moe_lens.figures.drops_over_time import drops_over_time
from moe_lens.figures.unserved_by_position import unserved_by_position
from moe_lens.numbers import count, decimal, percent
from moe_lens_dashboards.components.notices import made_up_note, not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import draw, show, sql
from moe_lens_dashboards.components.words import plain


def page(run: OpenRun) -> None:
    """Draw the page."""
    drops = run.ask("dropped_tokens", by_tag=False)
    recorded = run.ask("recorded_capacity")
    factor = _factor(recorded.table)
    if not drops.table["routed"].sum() > 0:
        not_recorded(run, "rows in these steps")
        return
    if run.info.knows_drops:
        _tiles(drops.table, factor)
        sql(drops, recorded)
        st.caption(plain(_policy(run)))
    if not run.info.knows_drops:
        not_recorded(run, "capacity")
    elif drops.table[["overflowed", "dropped", "unserved_tokens"]].sum().sum() > 0:
        _drops(run)
    else:
        not_recorded(run, "capacity")
    st.subheader("What another capacity would drop", anchor=False)
    sweep = run.ask("capacity_sweep")
    show(capacity_curve(sweep.table, factor), sweep)
    made_up_note(run)
    if factor is None:
        st.caption("No capacity of whole forwards was recorded, so that none is marked.")
    elif recorded.table["highest"].max() > 1.02 * recorded.table["lowest"].min():
        low, high = recorded.table["lowest"].min(), recorded.table["highest"].max()
        st.caption(
            f"The recorded factor is the mean: it was between {decimal(low)} and {decimal(high)}, "
            "since forwards differ in tokens."
        )


def _drops(run: OpenRun) -> None:
    left, right = st.columns(2)
    with left:
        draw(run, drops_by_layer, "dropped_tokens", by_tag=False)
        draw(run, drops_over_time, "load_over_time", every=run.every())
    with right:
        draw(run, drops_by_tag, "dropped_tokens")
        if run.info.token_rows:
            draw(run, unserved_by_position, "unserved_by_position")
        else:
            st.markdown("**Drops along the sequence**")
            not_recorded(run, "token rows")


def _tiles(drops: pd.DataFrame, factor: float | None) -> None:
    routed, tokens = int(drops["routed"].sum()), int(drops["tokens"].sum())
    unserved = int(drops["unserved_tokens"].sum())
    shown = (
        ("Choices", count(routed), "Of all layers, by valid tokens."),
        (
            "Overflow rate",
            percent(int(drops["overflowed"].sum()) / routed),
            "Choices that found their expert full: dropped, or moved to another expert.",
        ),
        (
            "Dropped-token rate",
            percent(int(drops["dropped"].sum()) / routed),
            "Choices that no expert computed.",
        ),
        (
            "Unserved",
            percent(unserved / tokens if tokens else None),
            f"Tokens for which no expert of a layer ran: {count(unserved)}, summed over layers.",
        ),
        (
            "Capacity factor",
            "not known" if factor is None else decimal(factor),
            "Slots over choices, as recorded: mean of layers and forwards.",
        ),
    )
    for column, (label, value, help) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, help=help, border=True)


def _factor(recorded: pd.DataFrame) -> float | None:
    if recorded.empty:
        return None
    forwards = recorded["forwards"]
    return float((recorded["capacity_factor"] * forwards).sum() / forwards.sum())


def _policy(run: OpenRun) -> str:
    """What the layers do with a choice whose expert is full."""
    low, high = run.filters.first_layer, run.filters.last_layer
    kinds = Counter(
        "experts choose their tokens"
        if layer.router == "expert-choice"
        else (layer.capacity_policy or "dropless (every choice is computed)").replace("-", " ")
        for layer in run.info.layers
        if (low is None or layer.layer >= low) and (high is None or layer.layer <= high)
    )
    parts = [f"{count(n)} layer{'s' * (n != 1)}: {kind}" for kind, n in kinds.items()]
    return f"What happens to a choice whose expert is full: {'; '.join(parts)}."
