"""Tables of a trace read back as plain rows, and the meta they are written under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.events import START_NS, Row

from moe_lens.trace.meta import Attempt, LayerInfo, Meta
from moe_lens.trace.reader import open_run


def new_meta(**changes: Any) -> Meta:
    """Meta of a recording that has just begun."""
    layers = [LayerInfo(0, "model.layers.0.mlp", 8, 2)]
    return Meta(
        **{"run_id": "run-0", "layers": layers, "attempts": [Attempt(0, START_NS)]} | changes
    )


def read_table(run: Path, name: str, rank: int = 0) -> pa.Table | None:
    """Sealed rows and open ones, straight from pyarrow; None without a file."""
    files = open_run(run)
    parts = [pq.read_table(p) for p in files.segments.get(name, {}).get(rank, [])]
    if name in files.streams:
        parts.append(files.streams[name][rank].replace_schema_metadata(None))
    return pa.concat_tables([_plain(p) for p in parts]) if parts else None


def read_rows(run: Path, name: str) -> list[Row]:
    table = read_table(run, name)
    return [] if table is None else table.to_pylist()


def _plain(table: pa.Table) -> pa.Table:
    """Without what differs between Parquet and Arrow: names of list items, nullability."""
    fields = []
    for f in table.schema:
        list_ = pa.types.is_list(f.type)
        fields.append(pa.field(f.name, pa.list_(f.type.value_type) if list_ else f.type))
    return table.cast(pa.schema(fields))
