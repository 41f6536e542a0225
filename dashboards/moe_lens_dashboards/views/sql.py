"""SQL: ask the trace anything, read-only, and see the answer as a table and a chart."""

from __future__ import annotations

import hashlib

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from moe_lens.errors import QueryError
from moe_lens.figures.text import shown
from moe_lens.figures.theme import figure
from moe_lens.numbers import count, decimal
from moe_lens.queries.catalog import question, questions
from moe_lens.queries.described import describe
from moe_lens.queries.files import csv_bytes, parquet_bytes
from moe_lens.queries.locked import ROWS, SECONDS, Answer, ask
from moe_lens.queries.session import Trace
from moe_lens_dashboards.components import link, traces
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import SQL_TEXT, chart
from moe_lens_dashboards.components.words import plain

_FIRST = (
    "select layer, expert, sum(routed) as routed\nfrom load\ngroup by all\norder by routed desc"
)
_EDITOR, _QUESTION, _ANSWER = "sql editor", "sql question", "moe_lens sql answer"
_IN_LINK = 1500
"""Characters of a query that still go into the address."""
_TABLE = 5_000
"""Rows that the table shows; a file that is downloaded has all that were fetched."""
_KINDS = {"bars": go.Bar, "line": go.Scatter, "points": go.Scatter}


def page(run: OpenRun) -> None:
    """Draw the page."""
    state = st.session_state
    if handed := state.pop(SQL_TEXT, None):
        state[_EDITOR] = handed
    state.setdefault(_EDITOR, link.own("q") or _FIRST)
    left, right = st.columns([3, 2])
    with left:
        st.selectbox(
            "Begin with a stored question",
            list(questions()),
            index=None,
            key=_QUESTION,
            placeholder="none",
            on_change=_begin,
            args=(run,),
        )
        text = st.text_area("Query", key=_EDITOR, height=300)
        if st.button("Run", type="primary", icon=":material/play_arrow:"):
            _run(run, text)
        st.caption(
            f"Reads only, within {SECONDS:g} s, at most {ROWS:,} rows. The filters do not apply "
            "here: write them into the query."
        )
    with right:
        _schema(run.path)
    held = state.get(_ANSWER)
    if held is not None:
        _show(*held)


def _begin(run: OpenRun) -> None:
    """Put a stored question into the editor, with the filters that it knows."""
    name = st.session_state[_QUESTION]
    if name is None:
        return
    asked = question(name)
    known = {p.name for p in asked.parameters}
    given = {k: v for k, v in run.filters.given().items() if k in known}
    st.session_state[_EDITOR] = asked.with_values(given)


def _run(run: OpenRun, text: str) -> None:
    st.session_state.pop(_ANSWER, None)
    link.set_own("q", text if len(text) <= _IN_LINK else None)
    try:
        with st.spinner("Running …"):
            found = ask([run.path], text, skip_damaged=traces.skip_damaged())
    except QueryError as e:
        st.error("The query could not be run.", icon=":material/error:")
        st.code(str(e), language=None)
        return
    st.session_state[_ANSWER] = (found, hashlib.blake2b(text.encode(), digest_size=8).hexdigest())


def _schema(path: str) -> None:
    trace, now = traces.current(path)
    name = st.selectbox("Columns of the view", trace.views, key="sql view")
    view = describe(name, _columns(path, now, name, trace))
    st.dataframe(
        pd.DataFrame(
            [(c.name, c.type.lower(), c.meaning) for c in view.columns],
            columns=["column", "type", "meaning"],
        ),
        hide_index=True,
        height=380,
    )
    if view.row:
        st.caption(f"A row is {plain(view.row)}")


@st.cache_data(max_entries=200, show_spinner=False)
def _columns(path: str, now: str, view: str, _trace: Trace) -> dict[str, str]:
    rows = _trace.sql(
        "select column_name, data_type from duckdb_columns() where table_name = $view "
        "order by column_index",
        view=view,
    ).rows()
    return {str(row["column_name"]): str(row["data_type"]) for row in rows}


def _show(found: Answer, key: str) -> None:
    result = found.result
    rows = len(result)
    more = "" if found.complete else f" (there are more: the first {ROWS:,} were fetched)"
    st.caption(f"{count(rows)} rows{more} in {decimal(found.seconds)} s")
    frame = result.df()
    table, drawn = st.tabs(["Table", "Chart"])
    with table:
        st.dataframe(frame.head(_TABLE), hide_index=True)
        if rows > _TABLE:
            st.caption(f"The table shows the first {_TABLE:,}; the files have all {rows:,}.")
        buttons = st.container(horizontal=True)
        buttons.download_button(
            "CSV", lambda: csv_bytes(result), f"{key}.csv", "text/csv", on_click="ignore"
        )
        buttons.download_button(
            "Parquet",
            lambda: parquet_bytes(result),
            f"{key}.parquet",
            "application/vnd.apache.parquet",
            on_click="ignore",
        )
    with drawn:
        _chart(frame, key)


def _chart(frame: pd.DataFrame, key: str) -> None:
    numeric = [c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c])]
    if frame.empty or not numeric:
        st.info("A chart needs a row and a column of numbers.", icon=":material/info:")
        return
    a, b, c, d = st.columns(4)
    x = a.selectbox("x", list(frame.columns), key=f"sql x {key}")
    y = b.selectbox("y", numeric, index=len(numeric) - 1, key=f"sql y {key}")
    kind = c.selectbox("as", list(_KINDS), key=f"sql kind {key}")
    others = [name for name in frame.columns if name not in (x, y)]
    by = d.selectbox("colour by", others, index=None, placeholder="nothing", key=f"sql by {key}")
    made = figure("")
    head = frame.head(_TABLE)
    groups = [("", head)] if by is None else list(head.groupby(by, sort=False, dropna=False))
    for name, rows in groups[:20]:
        more = {} if kind == "bars" else {"mode": "lines" if kind == "line" else "markers"}
        values = [shown(v) if isinstance(v, str) else v for v in rows[x]]
        made.add_trace(_KINDS[kind](x=values, y=rows[y], name=shown(name), **more))
    made.update_layout(showlegend=by is not None)
    made.update_xaxes(title_text=shown(x))
    made.update_yaxes(title_text=shown(y))
    chart(made, key=f"sql chart {key}")
