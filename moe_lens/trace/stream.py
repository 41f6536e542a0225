"""The open stream of one table: Arrow IPC, appended to whole batch by whole batch.

An unclosed Parquet file holds nothing, so rows wait in this stream until a segment is sealed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa


class _Whole:
    """A file for Arrow to write to: unbuffered, and every write is whole or an OSError."""

    def __init__(self, path: Path) -> None:
        # "x": a stream that exists belongs to somebody else, or was left by a dead writer.
        self.raw = path.open("xb", buffering=0)
        self.closed = False  # Arrow asks

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while view:
            view = view[self.raw.write(view) :]
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.raw.tell()

    def flush(self) -> None:
        """Nothing is held back."""


class OpenStream:
    """Appends record batches to a file; a completed append survives the process."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _Whole(path)
        # Straight from the columns into the file: a message put together in memory first would be
        # one more copy of every row.
        self._messages = pa.ipc.new_stream(self._file, schema)
        self.size = 0  # bytes of complete messages
        try:
            # Arrow writes the schema with the first batch: an empty one, so that it is there.
            self._messages.write_batch(pa.RecordBatch.from_pylist([], schema))
        except OSError:
            self.close()
            raise
        self.size = self._file.tell()

    def append(self, table: pa.Table) -> None:
        """Append the rows of a table with this schema.

        Raises:
            OSError: The disk refused; the stream then ends after the last complete batch.
        """
        for batch in table.combine_chunks().to_batches():
            try:
                self._messages.write_batch(batch)
            except OSError:
                os.ftruncate(self._file.raw.fileno(), self.size)
                self._file.raw.seek(self.size)
                raise
            self.size = self._file.tell()
            self.rows += batch.num_rows

    def sync(self) -> None:
        os.fsync(self._file.raw.fileno())

    def close(self) -> None:
        self._file.raw.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
