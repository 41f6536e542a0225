"""The coarse rollup of `load`: rows summed over up to `BUCKET` windows, for questions on long runs.

It is made from the rows of a segment when that is sealed, and lies beside it under the same number.
So it needs no memory while a run is recorded and no care when a writer dies: a segment without one
is read as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moe_lens.trace import layout
from moe_lens.trace.schema import BUCKET, LOAD_COARSE
from moe_lens.trace.segment import write_segment

WORTH = 4
"""Rows of `load` per row of the rollup below which there is none: it would save too little."""

_SUMS = [c.name for c in LOAD_COARSE.columns if c.packing == "split"]


def write_rollup(run: Path, rank: int, seq: int, load: pa.Table) -> None:
    """Write the rollup of a segment of `load`, where it is worth it.

    Args:
        run: Folder of the trace.
        rank: Whose segment.
        seq: Its number.
        load: Its rows.

    Raises:
        OSError: The disk refused; nothing was written.
    """
    coarse = roll_up(load)
    if coarse.num_rows * WORTH <= load.num_rows:
        path = layout.segment_path(run, LOAD_COARSE.name, rank, seq)
        write_segment(path, LOAD_COARSE, coarse)


def roll_up(load: pa.Table) -> pa.Table:
    """Rows of `load` as rows of `load_coarse`, in its order.

    A sum over what is null everywhere is null; elsewhere null counts as nothing, as in SQL.
    """
    if load.num_rows == 0:
        return LOAD_COARSE.schema.empty_table()
    keys: dict[str, NDArray[Any]] = {n: load[n].to_numpy() for n in ("layer", "attempt", "expert")}
    window, step = load["window"].to_numpy(), load["step"].to_numpy()
    (keys["phase"], phases), (keys["tag"], tags) = _coded(load["phase"]), _coded(load["tag"])
    by = ("layer", "bucket", "attempt", "phase", "tag", "expert")
    order, first = _groups([(keys | {"bucket": window // BUCKET})[n] for n in by])
    out: dict[str, Any] = {name: key[order[first]] for name, key in keys.items()}
    out["phase"], out["tag"] = phases.take(out["phase"]), tags.take(out["tag"])
    for name, values in (("window", window), ("step", step)):
        out[f"first_{name}"] = np.minimum.reduceat(values[order], first)
        out[f"last_{name}"] = np.maximum.reduceat(values[order], first)
    out |= {name: _sum(load[name], order, first) for name in _SUMS}
    arrays = [pa.array(out[f.name]).cast(f.type) for f in LOAD_COARSE.schema]
    return pa.Table.from_arrays(arrays, schema=LOAD_COARSE.schema)


def straddles(path: Path, superseded: dict[int, int]) -> bool:
    """A bucket of this rollup may hold windows on both sides of where an attempt was overtaken.

    Args:
        path: A rollup.
        superseded: Attempt to the first step at which its rows do not count any more.
    """
    footer = pq.read_metadata(path)
    at = {name: footer.schema.names.index(name) for name in ("attempt", "first_step", "last_step")}
    for i in range(footer.num_row_groups):
        of = {name: footer.row_group(i).column(at[name]).statistics for name in at}
        if any(x is None for x in of.values()):  # written by something else: not known
            return True
        for attempt, step in superseded.items():
            inside = of["attempt"].min <= attempt <= of["attempt"].max
            if inside and of["first_step"].min < step <= of["last_step"].max:
                return True
    return False


def _coded(texts: pa.ChunkedArray) -> tuple[NDArray[np.int32], pa.Array]:
    """A number for each text, and the texts by number."""
    first = texts[:1].combine_chunks()
    if pc.all(pc.equal(texts, first[0])).as_py():  # as a rule: a tenth of what encoding costs
        return np.zeros(len(texts), np.int32), first
    coded = texts.combine_chunks().dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False), coded.dictionary


def _groups(keys: list[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of rows that is sorted by the keys, and where in it each group begins."""
    code = np.zeros(len(keys[0]), np.int64)
    for key in keys:
        low, high = int(key.min()), int(key.max())
        code = code * (high - low + 1) + (key - low)
    order = np.argsort(code, kind="stable")
    return order, np.flatnonzero(np.diff(code[order], prepend=-1))


def _sum(column: pa.ChunkedArray, order: NDArray[np.int64], first: NDArray[np.int64]) -> pa.Array:
    """Sum of each group; null where all of it is null."""
    if column.null_count == len(column):
        return pa.nulls(len(first))
    values = column.fill_null(0).to_numpy()
    wide = values.astype(np.int64 if pa.types.is_integer(column.type) else np.float64, copy=False)
    if not wide.any():
        sums = np.zeros(len(first), wide.dtype)
    else:
        sums = np.add.reduceat(wide[order], first)
    if not column.null_count:
        return pa.array(sums)
    known = np.logical_or.reduceat(column.is_valid().to_numpy()[order], first)
    return pa.array(sums, mask=~known)
