"""Values as SQL literals, which DuckDB reads back as the same value of the same type."""

from __future__ import annotations

import math

Value = int | float | str | bool | None


def literal(value: Value) -> str:
    """The value as SQL, fit to stand anywhere in an expression."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return f"cast('{value}' as double)"
        # Without an exponent SQL reads a decimal, which rounds otherwise than a double.
        shown = repr(value) if "e" in repr(value) else f"{value!r}e0"
    else:
        shown = str(value)
    # Behind a minus, a bare minus would begin a comment.
    return f"({shown})" if shown.startswith("-") else shown


def _text(value: str) -> str:
    """A SQL text; NUL, which would end the query, by its number."""
    parts = ["'" + part.replace("'", "''") + "'" for part in value.split("\0")]
    return parts[0] if len(parts) == 1 else "(" + " || chr(0) || ".join(parts) + ")"
