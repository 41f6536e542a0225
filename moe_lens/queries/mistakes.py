"""DuckDB's errors as ours: what is wrong, where, and which names there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from moe_lens.errors import QueryError

if TYPE_CHECKING:
    import duckdb


_MISSING_TABLE = re.compile(r"Table with name (\S+) does not exist")
_HINT = re.compile(r"^(Did you mean|Candidate bindings)", re.MULTILINE)


def explain(error: duckdb.Error, views: Sequence[str]) -> QueryError:
    """The error with DuckDB's message in two lines, the views there are, and a near name."""
    text = str(error).strip()
    lines = [_first_line(text)]
    pointed = _pointed_line(text)
    if pointed:
        lines.append(pointed)
    missing = _MISSING_TABLE.search(text)
    if missing:
        near = difflib.get_close_matches(missing[1], views, 1, cutoff=0.5)
        if near:
            lines.append(f"Did you mean {near[0]}?")
    elif candidates := [line for line in text.splitlines() if _HINT.match(line)]:
        lines.append(candidates[0])
    lines.append(f"Views: {', '.join(views)}.")
    return QueryError("\n".join(lines))


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "DuckDB gave no message"


def _pointed_line(text: str) -> str | None:
    """The line of the query that DuckDB points at, cut to the neighbourhood of its caret."""
    lines = text.splitlines()
    for line, caret in pairwise(lines):
        match = re.match(r"LINE \d+: ", line)
        if match and set(caret.strip()) == {"^"}:
            at = caret.index("^")
            start = max(match.end(), at - 30)
            cut = line[start : at + 40].strip()
            return f"{match[0]}{'…' if start > match.end() else ''}{cut}"
    return None
