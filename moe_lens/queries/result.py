"""What a query returns: a table that shows itself, and turns into pandas or Arrow."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd


_SHOWN = 20


class Result:
    """Rows of an answer."""

    def __init__(self, table: pa.Table) -> None:
        self._table = _plain_integers(table)

    def arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self._table

    def df(self) -> pd.DataFrame:
        """The rows as a pandas data frame."""
        frame: pd.DataFrame = self._table.to_pandas()
        return frame

    def rows(self) -> list[dict[str, object]]:
        """The rows as plain dicts."""
        rows: list[dict[str, object]] = self._table.to_pylist()
        return rows

    @property
    def columns(self) -> list[str]:
        return list(self._table.column_names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __repr__(self) -> str:
        return self.text(_SHOWN)

    def text(self, rows: int | None = None) -> str:
        """The answer as a plain table of at most so many rows (None: all)."""
        head = [self.columns, *self._shown(rows)]
        widths = [max(map(len, column)) for column in zip(*head, strict=True)]
        right = [_numeric(t) for t in self._table.schema.types]
        lines = [
            "  ".join(
                c.rjust(w) if to_right else c.ljust(w)
                for c, w, to_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in head
        ]
        return "\n".join(lines + self._more(rows))

    def _repr_html_(self) -> str:
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in self.columns)
        rows = [f"<tr>{cells}</tr>"]
        for row in self._shown(_SHOWN):
            cells = "".join(f"<td>{html.escape(c)}</td>" for c in row)
            rows.append(f"<tr>{cells}</tr>")
        more = "".join(f"<p>{html.escape(line)}</p>" for line in self._more(_SHOWN))
        return f"<table>{''.join(rows)}</table>{more}"

    def _shown(self, rows: int | None) -> Iterator[list[str]]:
        shown = self._table if rows is None else self._table.slice(0, rows)
        for row in shown.to_pylist():
            yield [cell(value) for value in row.values()]

    def _more(self, rows: int | None) -> list[str]:
        hidden = 0 if rows is None else len(self) - rows
        return [f"… and {hidden:,} more rows"] if hidden > 0 else []


def cell(value: object) -> str:
    """A value as text for people: four significant digits, nothing for null."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list):
        return "[" + ", ".join(cell(v) for v in value) + "]"
    return " ".join(str(value).split("\n"))


def _numeric(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)
    )


def _plain_integers(table: pa.Table) -> pa.Table:
    """DuckDB sums integers into 128 bits, which pandas shows as objects: 64 wherever they fit."""
    for i, column in enumerate(table.schema):
        if pa.types.is_decimal(column.type) and column.type.scale == 0:
            try:
                narrow = table.column(i).cast(pa.int64())
            except pa.ArrowInvalid:
                continue  # a sum beyond 64 bits stays exact
            table = table.set_column(i, column.name, narrow)
    return table
