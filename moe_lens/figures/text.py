"""Text from data, made harmless for Plotly, which reads a part of HTML and TeX in every text."""

from __future__ import annotations

_MARKUP = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("$"): "&#36;"}


def shown(value: object, most: int | None = None) -> str:
    """A value as a reader should see it, letter by letter, in a title, a label or a hover text.

    Args:
        value: A tag, a request id, the name of a run.
        most: Letters after which it is cut.
    """
    # Plotly folds white space as HTML does; a line break would be lost without a sign.
    text = " ".join(str(value).split())
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    return text.translate(_MARKUP)
