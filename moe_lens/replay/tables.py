"""Rows of one table of a trace, batch by batch: sealed segments and the open stream alike.

What a later attempt overtook is left out, and so are ranks whose tokens another rank has too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from moe_lens.errors import TraceError
from moe_lens.trace.reader import RunFiles, superseded_from
from moe_lens.trace.schema import TABLES

BATCH = 131_072
"""Rows of a batch: a row group of a segment."""


def ranks(files: RunFiles) -> list[int]:
    """Ranks whose tokens are their own."""
    return files.ranks("load")


def batches(
    files: RunFiles,
    table: str,
    rank: int,
    columns: Sequence[str],
    only: pc.Expression | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows of a rank, in the order in which they lie: a batch at a time is in memory.

    Args:
        files: A snapshot of the run.
        table: One of `TABLES`.
        rank: Of which rank.
        columns: Which columns; one that an older trace lacks is null.
        only: Which rows. Row groups whose statistics exclude them are not read.

    Raises:
        TraceError: A segment cannot be read.
    """
    schema = TABLES[table].schema
    parts = []
    if paths := files.segments.get(table, {}).get(rank):
        parts.append(ds.dataset([str(p) for p in paths], schema=schema, format="parquet"))
    if (stream := files.streams.get(table, {}).get(rank)) is not None:
        parts.append(ds.dataset(_completed(stream, schema)))
    wanted = _counted(files, rank, only)
    for part in parts:
        try:
            yield from part.to_batches(
                columns=list(columns),
                filter=wanted,
                batch_size=BATCH,
                batch_readahead=1,
                fragment_readahead=1,
            )
        except (pa.ArrowException, OSError) as e:
            raise TraceError(f"{files.path}: table {table} of rank {rank}: {e}") from e


def rows(
    files: RunFiles,
    table: str,
    rank: int,
    columns: Sequence[str],
    only: pc.Expression | None = None,
) -> pa.Table:
    """All of `batches` at once, for tables that are small."""
    fields = [TABLES[table].schema.field(name) for name in columns]
    found = list(batches(files, table, rank, columns, only))
    return pa.Table.from_batches(found, pa.schema(fields))


def _counted(files: RunFiles, rank: int, only: pc.Expression | None) -> pc.Expression | None:
    """The filter, and that no later attempt overtook the row."""
    conditions = [] if only is None else [only]
    for attempt, first in superseded_from(files.metas[rank]).items():
        overtaken = (pc.field("attempt") == attempt) & (pc.field("step") >= first)
        conditions.append(~overtaken)
    return functools.reduce(operator.and_, conditions) if conditions else None


def _completed(stream: pa.Table, schema: pa.Schema) -> pa.Table:
    """The stream with every column of the schema; one that it lacks is null."""
    arrays = [
        stream.column(f.name).cast(f.type)
        if f.name in stream.column_names
        else pa.chunked_array([pa.nulls(stream.num_rows, f.type)])
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
