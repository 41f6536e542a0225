"""Sealing what a dead writer left: open streams become segments, temporary files go."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import TraceError, TraceWriteError
from moe_lens.trace import layout
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Meta, read_meta, write_meta
from moe_lens.trace.schema import LOAD_COARSE, with_keys
from moe_lens.trace.store import seal_stream


@dataclass(frozen=True)
class Recovered:
    """Rows of one table of one rank that were sealed."""

    rank: int
    table: str
    rows: int


def recover(run: str | Path) -> list[Recovered]:
    """Seal what dead writers left in a trace, rank by rank, each under its lock.

    Returns:
        What was sealed; empty when there was nothing to do.

    Raises:
        TraceError: There is no trace.
        TraceLocked: A rank's writer lives; the ranks before it were recovered.
        TraceWriteError: The disk refused; nothing was removed that is not sealed.
    """
    run = Path(run)
    found = layout.ranks(run)
    if not found:
        raise TraceError(f"{run} holds no moe_lens trace (no meta/rank=*.json): nothing to recover")
    out: list[Recovered] = []
    for rank in found:
        try:
            lock = RankLock(run, rank)
            try:
                out += recover_rank(run, read_meta(layout.meta_path(run, rank)))
            finally:
                lock.release()
        except OSError as e:
            raise TraceWriteError(f"cannot recover {run} (rank {rank}): {e}") from e
    return out


def recover_rank(run: Path, meta: Meta) -> list[Recovered]:
    """As `recover`, for one rank whose lock the caller holds; `meta` is brought up to date."""
    tables = with_keys(tuple(meta.keys))
    sealed = [
        Recovered(meta.rank, name, seal_stream(run, tables[name], meta.rank, seq))
        for name, seq in sorted(layout.streams(run, meta.rank))
        if name in tables
    ]
    for name in (*tables, LOAD_COARSE.name):
        for leftover in layout.segment_dir(run, name, meta.rank).glob(".*.tmp"):
            leftover.unlink()
    last = meta.attempts[-1] if meta.attempts else None
    if last is not None and last.end is None:
        last.end, last.ended_ns = "recovered", time.time_ns()
        write_meta(run, meta)
    return [r for r in sealed if r.rows]


def next_value(run: Path, meta: Meta, table: str, column: str) -> int:
    """One more than the largest value of a key column in the rank's segments; 0 without any.

    Raises:
        TraceError: A segment is damaged.
    """
    top = -1
    for path in layout.segments(run, table, meta.rank).values():
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as e:
            raise TraceError(
                f"{path} is damaged ({e}), so that it is not known how far the trace went: record "
                "into another folder."
            ) from e
        at = footer.schema.names.index(column)
        for group in range(footer.num_row_groups):
            top = max(top, footer.row_group(group).column(at).statistics.max)
    return top + 1
