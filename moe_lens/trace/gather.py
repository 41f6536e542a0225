"""Reorder Arrow rows by index, fast for the lists of one length that routing is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Order = NDArray[np.int64]


def lists(values_NK: NDArray[Any]) -> pa.ListArray:
    """A list column from a rectangular array: row i of `[N, K]` becomes list i."""
    n, k = values_NK.shape
    offsets = np.arange(n + 1, dtype=np.int32) * k
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_NK.ravel()))


class Gather:
    """Takes rows of one table by index, again and again."""

    def __init__(self, table: pa.Table) -> None:
        self.schema = table.schema
        self._columns = [_taker(table.column(i)) for i in range(table.num_columns)]

    def take(self, order: Order) -> pa.Table:
        """The rows with these indices, in this order."""
        return pa.Table.from_arrays([taker(order) for taker in self._columns], schema=self.schema)


def _taker(column: pa.ChunkedArray) -> Callable[[Order], pa.Array]:
    if column.null_count == len(column):
        return lambda order: pa.nulls(len(order), column.type)
    if column.null_count == 0:
        if pa.types.is_list(column.type):
            # pyarrow's take on lists costs as much again as writing the Parquet does.
            rectangle = _rectangle(column)
            if rectangle is not None:
                return lambda order: lists(rectangle[order])
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            values = column.to_numpy()
            return lambda order: pa.array(values[order])
    whole = column.combine_chunks()
    return lambda order: whole.take(pa.array(order))


def _rectangle(column: pa.ChunkedArray) -> NDArray[Any] | None:
    """The lists as `[N, K]` if all have one length, else None."""
    parts: list[NDArray[Any]] = []
    for chunk in column.chunks:
        if len(chunk) == 0:
            continue
        values = chunk.flatten()
        k = len(values) // len(chunk)
        if (np.diff(chunk.offsets.to_numpy()) != k).any() or (parts and k != parts[0].shape[1]):
            return None
        parts.append(values.to_numpy().reshape(len(chunk), k))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
