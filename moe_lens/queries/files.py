"""An answer as the bytes of a file."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq

from moe_lens.queries.result import Result


def csv_bytes(answer: Result) -> bytes:
    """The answer as CSV in UTF-8, with lists as JSON."""
    frame = answer.df()
    for name in frame.columns:
        if frame[name].map(lambda v: hasattr(v, "tolist") and v.ndim == 1).any():
            frame[name] = [
                json.dumps(v.tolist()) if hasattr(v, "tolist") else v for v in frame[name]
            ]
    return str(frame.to_csv(index=False)).encode()


def parquet_bytes(answer: Result) -> bytes:
    """The answer as a Parquet file, with its types."""
    out = io.BytesIO()
    pq.write_table(answer.arrow(), out)
    return out.getvalue()
