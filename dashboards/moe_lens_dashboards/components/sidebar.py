"""The one place of the filters: run, steps, layers, phase, tag, rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from moe_lens.errors import MoeLensError
from moe_lens_dashboards.components import link, traces
from moe_lens_dashboards.components.filters import Choices, Filters, parse
from moe_lens_dashboards.components.notices import failed
from moe_lens_dashboards.components.run import OpenRun, choices
from moe_lens_dashboards.components.words import plain


def sidebar(runs: Mapping[str, Path]) -> OpenRun | None:
    """Draw the sidebar.

    Args:
        runs: Name of each run to its folder, in the order in which they are listed.

    Returns:
        The chosen run with its filters; None where it cannot be read, which the page then says.
    """
    given, from_address = link.read()
    name = given.get("run", "")
    if name not in runs:
        if name:
            _left_out(f"There is no run {name}: the first one is shown.")
        name = next(iter(runs))
    path = str(runs[name].absolute())
    with st.sidebar:
        _pick("run", "Run", list(runs), name, clearable=False)
        try:
            found = choices(path)
        except MoeLensError as e:
            link.write({**given, "run": name})
            failed(e)
            return None
        filters, problems = parse(given, found)
        _filters(filters, found)
        if filters != Filters():
            st.button("Reset filters", on_click=_reset, icon=":material/filter_alt_off:")
        _facts(path)
    if from_address or problems:
        for problem in problems:
            _left_out(problem)
    texts = {key: str(value) for key, value in filters.given().items()}
    link.write({"run": name, **texts})
    return OpenRun(path, name, filters)


def _filters(now: Filters, found: Choices) -> None:
    left, right = st.columns(2)
    with left:
        _number("first_step", "From step", now.first_step, 0, None)
    with right:
        _number("last_step", "to step", now.last_step, 0, None)
    if len(found.layers) > 1:
        low, high = min(found.layers), max(found.layers)
        left, right = st.columns(2)
        with left:
            _number("first_layer", "From layer", now.first_layer, low, high)
        with right:
            _number("last_layer", "to layer", now.last_layer, low, high)
    for key, label, options, value in (
        ("phase", "Phase", found.phases, now.phase),
        ("tag", "Tag", found.tags, now.tag),
        ("rank", "Rank", found.ranks, now.rank),
    ):
        if len(options) > 1 or value is not None:
            _pick(key, label, list(options), value)


def _facts(path: str) -> None:
    info = traces.info(path)
    span = "" if info.first_step is None else f" ({info.first_step:,} to {info.last_step:,})"
    st.divider()
    steps = f"steps are {info.made_steps}" if info.made_steps else ""
    rows = f"{info.token_rows:,} rows of single tokens ({info.sampling})"
    facts = (
        info.model,
        info.shape,
        f"{info.steps:,} steps{span}",
        steps,
        info.kept if info.imported and info.no_rows else rows,
        f"imported from {info.imported}" if info.imported else info.state,
    )
    for fact in filter(None, facts):
        st.caption(plain(fact))


def _number(key: str, label: str, value: int | None, low: int, high: int | None) -> None:
    st.session_state[_widget(key)] = value
    st.number_input(
        label,
        min_value=low,
        max_value=high,
        value=None,
        step=1,
        key=_widget(key),
        placeholder="any",
        on_change=_taken,
        args=(key,),
    )


def _pick(key: str, label: str, options: list[Any], value: Any, *, clearable: bool = True) -> None:
    st.session_state[_widget(key)] = value
    st.selectbox(
        label,
        options,
        index=None if clearable else 0,
        key=_widget(key),
        placeholder="all",
        on_change=_taken,
        args=(key,),
    )


def _widget(key: str) -> str:
    return f"filter {key}"


def _taken(key: str) -> None:
    link.change(**{key: st.session_state[_widget(key)]})


def _reset() -> None:
    link.change(**dict.fromkeys(Filters().__dataclass_fields__))


def _left_out(sentence: str) -> None:
    st.warning(plain(sentence), icon=":material/link_off:")
