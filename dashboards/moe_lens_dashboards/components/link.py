"""The state of a view as the parameters of its link, so that a link is a view.

The truth is in the session; the address follows it, and is followed when it moved by itself: a link
that was opened, the browser's way back. (A page's menu entry drops the parameters: they come back
from the session.) Parameters that are no filter belong to the page that set them.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from moe_lens_dashboards.components.filters import NAMES

OURS = ("run", *NAMES)
_LINK, _MOVED, _PAGES = "moe_lens link", "moe_lens link moved", "moe_lens pages"


def read() -> tuple[dict[str, str], bool]:
    """The parameters that hold now, and whether they come from the address."""
    state = st.session_state
    found = {name: st.query_params[name] for name in OURS if name in st.query_params}
    held: dict[str, str] | None = state.get(_LINK)
    if held is None:
        return found, True
    if not state.pop(_MOVED, False) and found and found != held:
        return found, True
    return dict(held), False


def write(link: dict[str, str]) -> None:
    """Make these the parameters that hold, in the session and in the address."""
    st.session_state[_LINK] = dict(link)
    now = st.query_params.to_dict()
    others = {name: value for name, value in now.items() if name not in OURS}
    if now != link | others:
        st.query_params.from_dict(link | others)


def change(**values: Any) -> None:
    """Change filters from a callback; None takes one away."""
    state = st.session_state
    state[_LINK] = _changed(state.get(_LINK, {}), values)
    state[_MOVED] = True


def own(name: str) -> str | None:
    """A parameter of the page's own, as `expert`: None where the address has none."""
    return st.query_params.get(name)


def set_own(name: str, value: object) -> None:
    """Put a parameter of the page's own into the address; None takes it away."""
    if value is None:
        st.query_params.pop(name, None)
    elif st.query_params.get(name) != str(value):
        st.query_params[name] = str(value)


def remember_pages(pages: dict[str, Any]) -> None:
    """Tell `go` what pages there are, by name."""
    st.session_state[_PAGES] = pages


def go(page: str, **values: Any) -> None:
    """Show another page now, with these filters or parameters of its own changed."""
    link = _changed(st.session_state.get(_LINK, {}), values)
    st.session_state[_LINK] = {name: value for name, value in link.items() if name in OURS}
    st.switch_page(st.session_state[_PAGES][page], query_params=link)


def _changed(link: dict[str, str], values: dict[str, Any]) -> dict[str, str]:
    kept = {name: value for name, value in link.items() if name not in values}
    return kept | {name: str(value) for name, value in values.items() if value is not None}
