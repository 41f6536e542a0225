"""Results that a replay left beside a trace: as a view, and what each says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import TraceError
from moe_lens.queries.result import Result
from moe_lens.trace.reader import RunFiles
from moe_lens.trace.schema import REPLAY, Table

_KEY = b"moe_lens"
"""In a file's metadata: JSON of the machine, the policy, the sizes."""


def results(run: str | Path, table: Table = REPLAY) -> list[str]:
    """Names of the results that a run has, in order: `replay/<name>.parquet`, or of `REPLAY_EP`."""
    found = (Path(run) / table.name).glob("*.parquet")
    return sorted(p.stem for p in found if p.is_file() and not p.name.startswith("."))


def replayed(run: str | Path, name: str, rows: int) -> Result:
    """The first rows of one of them.

    Args:
        run: Folder of a trace.
        name: One of `results`.
        rows: How many at most.

    Raises:
        TraceError: There is no such result, or its file cannot be read.
    """
    path = _path(run, name)
    try:
        with pq.ParquetFile(path) as file:
            first = list(islice(file.iter_batches(batch_size=rows), 1))
            table = pa.Table.from_batches(first, file.schema_arrow)
    except (OSError, pa.ArrowException) as e:
        raise _unreadable(path, e) from e
    return Result(table)


def about(run: str | Path, name: str, table: Table = REPLAY) -> dict[str, Any] | None:
    """What a result says of itself: machine, policy, sizes, what was left out.

    Returns:
        None: another program wrote the file.

    Raises:
        TraceError: There is no such result, or its file cannot be read.
    """
    path = _path(run, name, table)
    try:
        said = (pq.read_schema(path).metadata or {}).get(_KEY)
        found = None if said is None else json.loads(said)
    except (OSError, pa.ArrowException, ValueError) as e:
        raise _unreadable(path, e) from e
    return found if isinstance(found, dict) else None


def replay_rows(runs: Mapping[str, RunFiles], table: Table = REPLAY) -> pa.Table:
    """Rows of every result of `moe-lens replay`, with `run` and `result` in front.

    Files of others, and those that cannot be read, are left out: the trace is read without them.
    """
    shape = pa.schema([("run", pa.string()), ("result", pa.string()), *table.schema])
    parts = [shape.empty_table()]
    for run, files in runs.items():
        for name in results(files.path, table):
            try:
                if about(files.path, name, table) is None:
                    continue
                whole = pq.read_table(_path(files.path, name, table), partitioning=None)
                rows = whole.select(table.schema.names).cast(table.schema)
            except (TraceError, OSError, KeyError, pa.ArrowException):
                continue
            named = (pa.array([text] * rows.num_rows, pa.string()) for text in (run, name))
            parts.append(pa.table([*named, *rows.columns], schema=shape))
    return pa.concat_tables(parts)


def _path(run: str | Path, name: str, table: Table = REPLAY) -> Path:
    if name not in results(run, table):
        raise TraceError(f"{run} has no {table.name} result {name!r}.")
    return Path(run) / table.name / f"{name}.parquet"


def _unreadable(path: Path, error: Exception) -> TraceError:
    return TraceError(f"{path} cannot be read: {error}. Write it again, or remove it.")
