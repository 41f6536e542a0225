"""What Compare compares: chosen on the page, kept in the address. A part of Compare.

The address has `against=RUN`, or the windows of steps `a=0-99` and `b=100-199`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import streamlit as st

from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.filters import parse
from moe_lens_dashboards.components.notices import not_recorded
from moe_lens_dashboards.components.run import OpenRun, choices
from moe_lens_dashboards.components.runs import listed
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.sides import Window, halves, in_link, window

_RUNS, _WINDOWS = "two runs", "two windows of this run"


@dataclass(frozen=True)
class Side:
    """A run with its filters, or a window of it."""

    letter: str
    name: str
    run: OpenRun


def two_sides(run: OpenRun) -> tuple[Side, Side] | None:
    """Draw what chooses the sides; None where there is nothing to compare, which it says."""
    others = [name for name in listed() if name != run.name]
    windows = (link.own("a") or link.own("b")) and not link.own("against")
    kind = _RUNS if others and not windows else _WINDOWS
    if others:
        st.session_state["compare kind"] = kind
        st.segmented_control(
            "Compare",
            [_RUNS, _WINDOWS],
            key="compare kind",
            required=True,
            on_change=_kind,
            args=(run, others[0]),
        )
    return _two_runs(run, others) if kind == _RUNS else _two_windows(run)


def _kind(run: OpenRun, other: str) -> None:
    if st.session_state["compare kind"] == _RUNS:
        _put(against=other, a=None, b=None)
    else:
        a, b = _default(run) or ((0, 0), (0, 0))
        _put(against=None, a=in_link(a), b=in_link(b))


def _two_runs(run: OpenRun, others: list[str]) -> tuple[Side, Side] | None:
    given = link.own("against")
    if given is not None and given not in (run.name, *others):
        _left_out(f"There is no other run {given}: against={given} in the link was left out.")
    now = given if given in others else others[0]
    link.set_own("against", now)
    st.session_state["compare against"] = now
    st.selectbox(
        "Run B (run A is that of the sidebar)",
        others,
        key="compare against",
        width=480,
        on_change=lambda: _put(against=st.session_state["compare against"]),
    )
    path = str(listed()[now].absolute())
    filters, _ = parse({k: str(v) for k, v in run.filters.given().items()}, choices(path))
    for what in ("phase", "tag", "rank"):
        wanted = getattr(run.filters, what)
        if wanted is not None and getattr(filters, what) is None:
            st.info(
                plain(f"{now} has no {what} {wanted}: nothing to compare within the filters."),
                icon=":material/info:",
            )
            return None
    layers = (run.filters.first_layer, run.filters.last_layer)
    # As they are in A: layers that B lacks give no rows.
    filters = dataclasses.replace(filters, first_layer=layers[0], last_layer=layers[1])
    return Side("A", run.name, run), Side("B", now, OpenRun(path, now, filters))


def _two_windows(run: OpenRun) -> tuple[Side, Side] | None:
    default = _default(run)
    if default is None:
        not_recorded(run, "rows in these steps")
        return None
    for name in ("a", "b"):
        if (text := link.own(name)) is not None and window(text) is None:
            _left_out(f"{name}={text} in the link is no window of steps, as 0-99: left out.")
    a, b = window(link.own("a")) or default[0], window(link.own("b")) or default[1]
    _inputs(a, b)
    _put(a=in_link(a), b=in_link(b))
    if run.filters.first_step is not None or run.filters.last_step is not None:
        st.caption("These windows stand in place of the sidebar's steps.")
    return _side("A", run, a), _side("B", run, b)


def _default(run: OpenRun) -> tuple[Window, Window] | None:
    """The halves of the steps within the filters."""
    info, filters = run.info, run.filters
    if info.first_step is None or info.last_step is None:
        return None
    first = info.first_step if filters.first_step is None else filters.first_step
    last = info.last_step if filters.last_step is None else filters.last_step
    return halves(first, max(first, last))


def _inputs(a: Window, b: Window) -> None:
    columns = st.columns(4)
    for i, (letter, span) in enumerate((("A", a), ("B", b))):
        for j, label in enumerate((f"{letter}: from step", f"{letter}: to step")):
            key = f"compare {letter} {j}"
            st.session_state[key] = span[j]
            columns[2 * i + j].number_input(
                label, min_value=0, step=1, key=key, on_change=_window, args=(letter, j)
            )


def _window(letter: str, moved: int) -> None:
    """Take a window from its inputs; the end that was not moved gives way."""
    ends = [st.session_state[f"compare {letter} {j}"] for j in (0, 1)]
    if ends[0] > ends[1]:
        ends[1 - moved] = ends[moved]
    _put(**{letter.lower(): in_link((ends[0], ends[1]))})


def _side(letter: str, run: OpenRun, span: Window) -> Side:
    filters = dataclasses.replace(run.filters, first_step=span[0], last_step=span[1])
    name = f"step {span[0]:,}" if span[0] == span[1] else f"steps {span[0]:,} to {span[1]:,}"
    return Side(letter, name, dataclasses.replace(run, filters=filters))


def _put(**values: str | None) -> None:
    """Change several parameters at once: each change is a step of the browser's way back."""
    now = st.query_params.to_dict()
    wanted = {k: v for k, v in (now | values).items() if v is not None}
    if wanted != now:
        st.query_params.from_dict(wanted)


def _left_out(sentence: str) -> None:
    st.warning(plain(sentence), icon=":material/link_off:")
