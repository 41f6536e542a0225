"""Results that a replay left beside a trace, as they are."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import TraceError
from moe_lens.queries.result import Result


def results(run: str | Path) -> list[str]:
    """Names of the results that a run has, in order: `replay/<name>.parquet`."""
    return sorted(p.stem for p in (Path(run) / "replay").glob("*.parquet") if p.is_file())


def replayed(run: str | Path, name: str, rows: int) -> Result:
    """The first rows of one of them.

    Args:
        run: Folder of a trace.
        name: One of `results`.
        rows: How many at most.

    Raises:
        TraceError: There is no such result, or its file cannot be read.
    """
    if name not in results(run):
        raise TraceError(f"{run} has no replay result {name!r}.")
    path = Path(run) / "replay" / f"{name}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            first = list(islice(file.iter_batches(batch_size=rows), 1))
            table = pa.Table.from_batches(first, file.schema_arrow)
    except (OSError, pa.ArrowException) as e:
        raise TraceError(f"{path} cannot be read: {e}. Write it again, or remove it.") from e
    return Result(table)
