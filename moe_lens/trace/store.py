"""The files of one rank of a trace: open streams, sealed segments, the disk bound.

Synchronous and for one thread; `writer.py` runs it on a thread of its own.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.trace import layout
from moe_lens.trace.meta import Meta, write_meta
from moe_lens.trace.reader import read_stream
from moe_lens.trace.rollup import write_rollup
from moe_lens.trace.schema import LOAD_COARSE, Table, with_keys
from moe_lens.trace.segment import write_segment
from moe_lens.trace.stream import OpenStream

SEAL_ROWS = 1_500_000
SEAL_SECONDS = 600.0


class _Open:
    """A table's open stream and since when it holds rows (monotonic seconds)."""

    def __init__(self, stream: OpenStream, seq: int) -> None:
        self.stream = stream
        self.seq = seq
        self.since = time.monotonic()


class TraceStore:
    """Appends rows to the tables of one rank and seals them into segments.

    Args:
        run: Folder of the trace.
        meta: What is known of the rank; written at once.
        seal_rows: Rows at which a table's open stream becomes a segment.
        seal_seconds: Age at which it does.
        max_bytes: Bound on what the rank holds on disk, kept by removing the oldest segments of
            per-token tables. Counts are never removed.
    """

    def __init__(
        self,
        run: Path,
        meta: Meta,
        *,
        seal_rows: int = SEAL_ROWS,
        seal_seconds: float = SEAL_SECONDS,
        max_bytes: int | None = None,
    ) -> None:
        self.run = run
        self.meta = meta
        self.tables = with_keys(tuple(meta.keys))
        self.seal_rows = seal_rows
        self.seal_seconds = seal_seconds
        self.max_bytes = max_bytes
        # Streams are not compressed: under a bound on the disk they must not grow into all of it.
        self._seal_bytes = max_bytes // 8 if max_bytes is not None else sys.maxsize
        self._open: dict[str, _Open] = {}
        self._next_seq = {name: next_seq(run, name, meta.rank) for name in self.tables}
        write_meta(run, meta)

    def append(self, name: str, rows: pa.Table) -> None:
        """Append rows (of the table's schema) to the table's open stream; seal it when full."""
        if rows.num_rows == 0:
            return
        if name not in self._open:
            seq = self._next_seq[name]
            path = layout.stream_path(self.run, name, self.meta.rank, seq)
            self._open[name] = _Open(OpenStream(path, self.tables[name].schema), seq)
            self._next_seq[name] = seq + 1
        self._open[name].stream.append(rows)
        stream = self._open[name].stream
        if stream.rows >= self.seal_rows or stream.size >= self._seal_bytes:
            self.seal(name)

    def sync(self) -> None:
        """On return everything appended would survive the death of the machine."""
        for entry in self._open.values():
            entry.stream.sync()

    def seal_old(self) -> None:
        """Seal every stream that has been open longer than `seal_seconds`."""
        now = time.monotonic()
        for name, entry in list(self._open.items()):
            if now - entry.since >= self.seal_seconds:
                self.seal(name)

    def seal(self, name: str) -> None:
        """Turn the table's open stream into a segment."""
        entry = self._open.pop(name)
        entry.stream.close()
        seal_stream(self.run, self.tables[name], self.meta.rank, entry.seq)
        self._prune()

    def close(self) -> None:
        """Seal everything."""
        for name in list(self._open):
            self.seal(name)
        self.save_meta()

    def abandon(self) -> None:
        """Close the files as they are: what was appended stays readable in the open streams."""
        for entry in self._open.values():
            entry.stream.close()
        self._open.clear()

    def save_meta(self) -> None:
        write_meta(self.run, self.meta)

    def _prune(self) -> None:
        if self.max_bytes is None:
            return
        rank = self.meta.rank
        names = (*self.tables, LOAD_COARSE.name)
        sealed = {name: layout.segments(self.run, name, rank) for name in names}
        sizes = {p: p.stat().st_size for paths in sealed.values() for p in paths.values()}
        streams = sum(p.stat().st_size for p in layout.streams(self.run, rank).values())
        over = sum(sizes.values()) + streams - self.max_bytes
        oldest = sorted(
            (p.stat().st_mtime_ns, name, p)
            for name, paths in sealed.items()
            if name in self.tables and self.tables[name].per_token
            for p in paths.values()
        )
        for _, name, path in oldest:
            if over <= 0:
                return
            self.meta.pruned[name] = self.meta.pruned.get(name, 0) + _rows(path)
            self.save_meta()  # said before it is done: a death in between loses nothing in silence
            path.unlink()
            over -= sizes[path]
        if over > 0:
            text = "max_bytes is too small for the counts alone, which are never removed"
            self.meta.warnings[text] = self.meta.warnings.get(text, 0) + 1


def next_seq(run: Path, name: str, rank: int) -> int:
    """The first sequence number of a table that neither a segment nor a stream has."""
    used = [-1, *layout.segments(run, name, rank)]
    used += [seq for table, seq in layout.streams(run, rank) if table == name]
    return max(used) + 1


def seal_stream(run: Path, table: Table, rank: int, seq: int) -> int:
    """Write the open stream `seq` as a segment, then remove it. A torn tail is left out.

    Returns:
        Rows sealed. A stream whose segment exists already is only removed (0 rows): the writer
        died between the two.
    """
    source = layout.stream_path(run, table.name, rank, seq)
    target = layout.segment_path(run, table.name, rank, seq)
    rows = None if target.exists() else read_stream(source)
    if rows is not None and rows.num_rows:
        rows = _of_today(table, rows)
        if table.name == "load":
            write_rollup(run, rank, seq, rows)
        write_segment(target, table, rows)
    source.unlink()
    return 0 if rows is None else int(rows.num_rows)


def _of_today(table: Table, rows: pa.Table) -> pa.Table:
    """The rows of a stream; columns that came after the version that wrote it are null."""
    for field in table.schema:
        if field.nullable and field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(table.schema.names)


def _rows(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)
