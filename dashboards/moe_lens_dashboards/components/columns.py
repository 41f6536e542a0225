"""How columns of tables are called and written: shares in percent, counts with separators."""

from __future__ import annotations

from typing import Any

import streamlit as st


def share(label: str, help: str | None = None) -> Any:
    """A share of 1, in percent."""
    return st.column_config.NumberColumn(label, format="percent", help=help)


def whole(label: str, help: str | None = None) -> Any:
    """A count."""
    return st.column_config.NumberColumn(label, format="localized", help=help)


def number(label: str, digits: int = 3, help: str | None = None) -> Any:
    """A number with so many decimals."""
    return st.column_config.NumberColumn(label, format=f"%.{digits}f", help=help)


def digits(label: str, help: str | None = None) -> Any:
    """A number with three digits that say something, however small it is."""
    return st.column_config.NumberColumn(label, format="%.3g", help=help)


def cost(label: str, help: str | None = None) -> Any:
    """A change of a loss, with its sign."""
    return st.column_config.NumberColumn(label, format="%+.4f", help=help)


def text(label: str, help: str | None = None) -> Any:
    """Text or a name, as it is."""
    return st.column_config.TextColumn(label, help=help)
