"""Entry point: `streamlit run` calls this file for every look at a page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import streamlit as st

from moe_lens.errors import MoeLensError
from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.notices import failed
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.runs import listed
from moe_lens_dashboards.components.sidebar import sidebar
from moe_lens_dashboards.components.words import plain
from moe_lens_dashboards.pages import VIEWS, View


def main() -> None:
    """Draw the sidebar, then the page."""
    # A file of ours: of named icons and emojis the browser would fetch pictures from elsewhere.
    icon = str(Path(__file__).with_name("icon.svg"))
    st.set_page_config(page_title="moe_lens", page_icon=icon, layout="wide")
    runs = listed()
    opened: list[OpenRun | None] = [sidebar(runs) if runs else None]
    pages = {
        view.name: st.Page(
            _body(view, opened),
            title=view.title,
            icon=view.icon,
            url_path=view.path or None,
            default=view is VIEWS[0],
            visibility="visible" if view.shown(opened[0]) else "hidden",
        )
        for view in VIEWS
    }
    page = st.navigation(list(pages.values()), position="top")
    link.remember_pages(pages)
    if not runs:
        st.error("No run was named. Start with: moe-lens dashboard RUN", icon=":material/error:")
        return
    page.run()


def _body(view: View, opened: list[OpenRun | None]) -> Callable[[], None]:
    body = partial(_page, view, opened)
    body.__name__ = view.name  # type: ignore[attr-defined]  # by which Streamlit tells pages apart
    return body


def _page(view: View, opened: list[OpenRun | None]) -> None:
    run = opened[0]
    if run is None:
        st.info("The run that the sidebar names cannot be read: it says why. Choose another.")
        return
    narrowed = run.filters.in_words()
    st.header(view.title, anchor=False)
    st.caption(plain(f"{run.name} · {narrowed}" if narrowed else run.name))
    try:
        view.page()(run)
    except MoeLensError as e:  # a trace that was deleted while it was open, for one
        failed(e)


if __name__ == "__main__":
    main()
