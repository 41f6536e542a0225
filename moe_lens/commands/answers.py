"""A query's answer as text or as a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moe_lens.numbers import finite
from moe_lens.queries.files import csv_bytes, parquet_bytes
from moe_lens.queries.result import Result


def to_text(answer: Result, format: str, rows: int | None) -> str:
    """The answer as a table, CSV or JSON (a list of objects, one a line), ending in a newline.

    Args:
        answer: What a query returned.
        format: table, csv or json.
        rows: Rows that a table shows at most; None: all. The others always have all.
    """
    if format == "csv":
        return csv_bytes(answer).decode()
    if format == "json":
        lines = [json.dumps(finite(row), ensure_ascii=False, default=str) for row in answer.rows()]
        return "[" + ",\n ".join(lines) + "]\n"
    return answer.text(rows) + "\n"


def write_parquet(answer: Result, out: Path | None) -> None:
    """Write the answer as Parquet, to a file or to standard output."""
    data = parquet_bytes(answer)
    if out is None:
        sys.stdout.buffer.write(data)
    else:
        out.write_bytes(data)
