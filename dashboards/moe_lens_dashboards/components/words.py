"""Text from a trace, shown as text and never read as markup. Numbers: `moe_lens.numbers`."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"([!-/:-@\[-`{-~])")


def plain(text: object) -> str:
    r"""Text that Markdown shows as it is: every punctuation mark is escaped, lines are joined.

    Needed wherever Streamlit reads Markdown: labels of metrics and expanders, notices, captions.
    """
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))
