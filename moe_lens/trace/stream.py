"""The open stream of one table: Arrow IPC, appended to whole batch by whole batch.

An unclosed Parquet file holds nothing, so rows wait in this stream until a segment is sealed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

MESSAGE_ROWS = 131_072
"""Rows of one message at most: it is put together in memory."""


class OpenStream:
    """Appends record batches to a file; a completed append survives the process."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        # "x": a stream that exists belongs to somebody else, or was left by a dead writer.
        self._file = path.open("xb", buffering=0)
        self.size = 0  # bytes of complete messages
        try:
            self._write(schema.serialize())
        except OSError:
            self.close()
            raise

    def append(self, table: pa.Table) -> None:
        """Append the rows of a table with this schema.

        Raises:
            OSError: The disk refused; the stream then ends after the last complete batch.
        """
        for batch in table.combine_chunks().to_batches(max_chunksize=MESSAGE_ROWS):
            # Put together in memory: Arrow's own writer hands a file each column apart, and for
            # the short batches of counts that costs four times as much.
            self._write(batch.serialize())
            self.rows += batch.num_rows

    def _write(self, message: pa.Buffer) -> None:
        """The whole message or nothing of it."""
        view = memoryview(message)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self.size)
            self._file.seek(self.size)
            raise
        self.size += message.size

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
