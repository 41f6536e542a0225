"""Charts on a page: each can show the SQL behind it."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from moe_lens.figures.blank import because
from moe_lens.figures.theme import dressed
from moe_lens.numbers import count
from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.run import Asked, OpenRun
from moe_lens_dashboards.components.words import plain

SQL_TEXT = "moe_lens sql text"
"""Where the SQL page finds the query that a chart hands it."""

_CLEAR = "rgba(0, 0, 0, 0)"
_CONFIG = {"displaylogo": False, "scrollZoom": False}


def draw(
    run: OpenRun,
    figure: Callable[..., go.Figure],
    question: str,
    *,
    look: dict[str, Any] | None = None,
    key: str | None = None,
    **parameters: Any,
) -> pd.DataFrame:
    """Ask a question within the filters, draw the figure made for it, and offer its SQL.

    Args:
        run: The run.
        figure: One of `moe_lens.figures`, which takes this question's table.
        question: The stored question.
        look: Further arguments of the figure.
        key: As `show` takes it.
        **parameters: Of the question, before the filters.

    Returns:
        The table that was drawn.
    """
    asked = run.ask(question, **parameters)
    show(figure(asked.table, **(look or {})), asked, key=key)
    return asked.table


def show(figure: go.Figure, *asked: Asked, key: str | None = None) -> None:
    """Draw a figure, and offer the SQL of the answers that it was made of.

    Args:
        figure: One of ours.
        *asked: What it was made of.
        key: Of the chart on its page. With one, a chart of something else in the same place is
            the old one changed, which is drawn sooner; else it is told by what was asked.
    """
    key = key or _key(figure, asked)
    for info in (each.of for each in asked if each.of is not None):
        figure = because(figure, info)
    chart(figure, key=f"chart {key}")
    ignored = sorted({name for each in asked for name in each.ignored})
    if ignored:
        st.caption(f"Not narrowed by: {', '.join(plain(n.replace('_', ' ')) for n in ignored)}.")
    for most in {each.at_most for each in asked if each.at_most is not None}:
        st.caption(f"From at most about {count(most)} tokens, drawn evenly: `most` in its SQL.")
    sql(*asked, key=key)


def chart(figure: go.Figure, *, key: str | None = None) -> None:
    """Draw a figure in the look of the page, its titles as text that wraps; it may lose them."""
    # A figure is light when it is made, and a copy of it takes as long as making it.
    made = dressed(figure, dark=True) if st.context.theme.type == "dark" else figure
    title = made.layout.title
    if title.text:
        st.markdown(f"**{plain(_text(title.text))}**")
    if title.subtitle.text:
        st.caption(plain(_text(title.subtitle.text)))
    top = 64 if made.layout.height else 0
    made.update_layout(title=None, margin_t=12, height=(made.layout.height or 380) - top)
    made.update_layout(paper_bgcolor=_CLEAR, plot_bgcolor=_CLEAR)
    st.plotly_chart(made, theme=None, config=_CONFIG, key=key)


def sql(*asked: Asked, key: str | None = None) -> None:
    """Offer the SQL of answers, for what is shown otherwise than as a chart."""
    key = key or _key(None, asked)
    with st.expander("SQL"):
        for i, each in enumerate(asked):
            st.code(each.sql, language="sql")
            if st.button("Open on the SQL page", key=f"sql {key} {i}", icon=":material/terminal:"):
                st.session_state[SQL_TEXT] = each.sql
                link.go("sql")


def _text(markup: str) -> str:
    """What Plotly's markup says, without it."""
    return html.unescape(markup.replace("<br>", " "))


def _key(figure: go.Figure | None, asked: tuple[Asked, ...]) -> str:
    """The same for the same chart, so that it stays itself when the page is drawn again."""
    look = None if figure is None else figure.layout
    title = "" if look is None else f"{look.title.subtitle.text}{look.yaxis.title.text}"
    what = repr([(each.question, sorted(each.parameters.items())) for each in asked])
    return hashlib.blake2b((title + what).encode(), digest_size=8).hexdigest()
