"""The dashboard's app under Streamlit's AppTest."""

from __future__ import annotations

from typing import Any


def tile(app: Any, label: str) -> str:
    """Value of the metric of this label."""
    return str(next(m.value for m in app.metric if m.label == label))


def chosen(app: Any, label: str) -> Any:
    """Widget of the sidebar."""
    widgets = [*app.sidebar.selectbox, *app.sidebar.number_input]
    return next(w for w in widgets if w.label == label)


def button(app: Any, label: str) -> Any:
    """The first button of this label, in the sidebar or on the page."""
    return next(b for b in [*app.sidebar.button, *app.button] if b.label == label)


def turned(app: Any, page: str) -> Any:
    """The app at another page. (AppTest can only switch to pages that are files of their own.)"""
    pages = app._registered_pages
    app._page_hash = next(k for k, v in pages.items() if v.get("url_pathname") == page)
    return app.run()


def texts(app: Any) -> str:
    """Everything that the page says in notices, captions and Markdown, without escapes."""
    parts = [*app.error, *app.warning, *app.info, *app.caption, *app.markdown]
    return "\n".join(str(p.value) for p in parts).replace("\\", "")
