"""Live: a run that is being recorded, drawn again every two seconds."""

from __future__ import annotations

import dataclasses

import streamlit as st

from moe_lens.errors import MoeLensError
from moe_lens.figures.load_heatmap import load_heatmap
from moe_lens.figures.load_over_time import load_over_time
from moe_lens.figures.router_over_time import router_over_time
from moe_lens.numbers import NONE, count, decimal
from moe_lens.queries.info import RunInfo
from moe_lens_dashboards.components.notices import failed, not_recorded
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import draw, sql
from moe_lens_dashboards.components.words import plain

_SECONDS = 2.0
"""Between looks; the writer hands over what it has every five seconds."""


def page(run: OpenRun) -> None:
    """Draw the page, and again while the run is being recorded."""
    minutes = st.segmented_control(
        "The last", [1, 5, 30], default=5, format_func=lambda m: f"{m} min", key="live minutes"
    )
    every = _SECONDS if run.info.unfinished else None
    st.fragment(_now, run_every=every)(run, float(minutes or 5))


def _now(run: OpenRun, minutes: float) -> None:
    try:
        run.look()
        _draw(run, minutes)
    except MoeLensError as e:
        failed(e)


def _draw(run: OpenRun, minutes: float) -> None:
    info = run.info
    recent = run.ask("recent", minutes=minutes)
    _state(info)
    if recent.table.empty and info.tokens and info.imported:
        not_recorded(run, "times")
        return
    if recent.table.empty:
        not_recorded(run, "rows in these steps")
        return
    now = recent.table.iloc[0]
    first, last = int(now["first_step"]), int(now["last_step"])
    lag = info.last_write_seconds if info.unfinished else None
    shown = (
        ("Step", count(last), "The newest that was written."),
        ("Tokens per second", count(now["tokens_per_second"]), "Valid tokens over wall time."),
        (
            "Capture lag",
            NONE if lag is None else f"{decimal(max(lag, 0), 1)} s",
            "Age of the newest write. Up to five seconds is normal while forwards run.",
        ),
        ("Lost rows", count(now["lost_rows"]), "Rows of single tokens that were not written."),
        ("Breaches", count(now["breaches"]), "Invariants of the capture that failed."),
    )
    for column, (label, value, help) in zip(st.columns(len(shown)), shown, strict=True):
        column.metric(label, value, help=help, border=True)
    sql(recent, key="live recent")
    narrowed = dataclasses.replace(run.filters, first_step=first, last_step=last)
    latest = dataclasses.replace(run, filters=narrowed)
    every = latest.every()
    left, right = st.columns(2)
    with left:
        draw(latest, load_over_time, "load_over_time", every=every)
    with right:
        draw(latest, router_over_time, "router_over_time", every=every)
    draw(latest, load_heatmap, "load_map")


def _state(info: RunInfo) -> None:
    if info.imported and not info.unfinished:
        st.info(plain(f"This trace was imported from {info.imported}."), icon=":material/info:")
    elif info.unfinished:
        st.caption(f":green[:material/sensors:] {plain(info.state)}")
    else:
        st.info(
            f"This recording has ended: {plain(info.state)}. Its last minutes:",
            icon=":material/info:",
        )
    for text, times in info.warnings.items():
        st.warning(f"{plain(text)} ({times:,}×)", icon=":material/warning:")
