"""What a page is about, chosen among a few and kept in the address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import streamlit as st

from moe_lens_dashboards.components import link
from moe_lens_dashboards.components.words import plain

_WIDTH = 320
"""Pixels: no wider than a short name needs."""

T = TypeVar("T", int, str)


def choose(
    name: str,
    label: str,
    options: Sequence[T],
    default: T,
    *,
    words: Callable[[T], str] = str,
) -> T:
    """A menu whose value is the parameter `name` of the page; of the default the address is silent.

    Args:
        name: Of the parameter.
        label: Of the menu.
        options: What there is to choose from; one at least.
        default: One of them. A link to something else shows it, and the page says so.
        words: What the menu calls an option.
    """
    by_text = {str(option): option for option in options}
    given = link.own(name)
    if given is not None and given not in by_text:
        st.warning(
            plain(f"{name}={given} in the link is not here: left out."), icon=":material/link_off:"
        )
        link.set_own(name, None)
    now = by_text.get(given or "", default)
    key = f"choose {name}"
    st.session_state[key] = now
    st.selectbox(
        label,
        options,
        format_func=words,
        key=key,
        on_change=_taken,
        args=(name, key, default),
        width=_WIDTH,
    )
    return now


def _taken(name: str, key: str, default: T) -> None:
    value = st.session_state[key]
    link.set_own(name, None if value == default else value)
