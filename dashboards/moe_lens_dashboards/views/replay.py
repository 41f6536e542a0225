"""Replay: what was measured by running the routing of the trace again."""

from __future__ import annotations

import streamlit as st

from moe_lens.errors import TraceError
from moe_lens.numbers import count
from moe_lens.queries.replayed import replayed, results
from moe_lens_dashboards.components.notices import failed
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.words import plain

_ROWS = 5_000


def page(run: OpenRun) -> None:
    """Draw the page."""
    names = results(run.path)
    if not names:
        st.info("This run has no results of a replay.", icon=":material/info:")
    for name in names:
        st.subheader(plain(name), anchor=False)
        try:
            found = replayed(run.path, name, _ROWS)
        except TraceError as e:
            failed(e)
            continue
        st.dataframe(found.df(), hide_index=True)
        if len(found) == _ROWS:
            st.caption(f"The first {count(_ROWS)} rows.")
