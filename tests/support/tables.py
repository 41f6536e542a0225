"""Reading a trace's tables the plainest way: pyarrow over the files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa

from moe_lens.trace.reader import open_run
from moe_lens.trace.schema import TABLES


def read(run: Path, name: str) -> pa.Table:
    """All rows of a table, sealed and open; no rows where nothing was written."""
    import pyarrow.parquet as pq

    files = open_run(run)
    parts = [TABLES[name].schema.empty_table()]
    for paths in files.segments.get(name, {}).values():
        parts += [pq.ParquetFile(p).read() for p in paths]
    parts += files.streams.get(name, {}).values()
    return pa.concat_tables(parts, promote_options="default")


def frame(run: Path, name: str) -> pd.DataFrame:
    """As `read`, as a pandas frame."""
    return read(run, name).to_pandas()
