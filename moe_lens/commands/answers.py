"""A query's answer as text or as a file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pyarrow.parquet as pq

from moe_lens.queries.result import Result


def to_text(answer: Result, format: str, rows: int | None) -> str:
    """The answer as a table, CSV or JSON (a list of objects, one a line), ending in a newline.

    Args:
        answer: What a query returned.
        format: table, csv or json.
        rows: Rows that a table shows at most; None: all. The others always have all.
    """
    if format == "csv":
        frame = answer.df()
        for name in frame.columns:  # lists as JSON, not as numpy prints its arrays
            if frame[name].map(lambda v: hasattr(v, "tolist") and v.ndim == 1).any():
                frame[name] = [
                    json.dumps(v.tolist()) if hasattr(v, "tolist") else v for v in frame[name]
                ]
        return str(frame.to_csv(index=False))
    if format == "json":
        lines = [json.dumps(_finite(row), ensure_ascii=False, default=str) for row in answer.rows()]
        return "[" + ",\n ".join(lines) + "]\n"
    return answer.text(rows) + "\n"


def write_parquet(answer: Result, out: Path | None) -> None:
    """Write the answer as Parquet, to a file or to standard output."""
    if out is None:
        pq.write_table(answer.arrow(), sys.stdout.buffer)
    else:
        pq.write_table(answer.arrow(), out)


def _finite(value: object) -> object:
    """The value as JSON can say it: no NaN, no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value
