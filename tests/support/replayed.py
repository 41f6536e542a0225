"""Results of a replay, made up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.trace.schema import REPLAY

ABOUT = {"state": "complete", "policy": {"name": "drop"}}


def timings(seed: int, forwards: int = 7) -> list[dict[str, Any]]:
    """Made-up timings of two layers in two phases."""
    draw = random.Random(seed)
    out = []
    for step in range(forwards):
        for layer in (0, 3):
            row: dict[str, Any] = {}
            for column in REPLAY.columns:
                big = pa.types.is_integer(column.type)
                row[column.name] = draw.randint(1, 1000) if big else 1e6 * draw.uniform(0.5, 9)
            row |= {"rank": 0, "layer": layer, "step": step, "forward": 0}
            row["phase"] = "train" if step % 2 else "eval"
            out.append(row)
    return out


def write(run: Path, name: str, found: list[dict[str, Any]], said: object = ABOUT) -> None:
    (run / "replay").mkdir(exist_ok=True)
    metadata = {} if said is None else {"moe_lens": json.dumps(said)}
    table = pa.Table.from_pylist(found, REPLAY.schema.with_metadata(metadata))
    pq.write_table(table, run / "replay" / f"{name}.parquet")
