"""Tables made of meta files: `moe_layers` (how each router is configured) and `runs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import pyarrow as pa

from moe_lens.errors import TraceError
from moe_lens.trace.meta import LayerInfo

if TYPE_CHECKING:
    from moe_lens.trace.reader import RunFiles


_ARROW = {int: pa.int64(), str: pa.string(), bool: pa.bool_(), float: pa.float64()}

RUNS = pa.schema(
    [
        ("run", pa.string()),
        ("rank", pa.int32()),
        ("path", pa.string()),
        ("run_id", pa.string()),
        ("model", pa.string()),
        ("world", pa.int64()),
        ("counts", pa.string()),
        ("sampling", pa.string()),
        ("weights", pa.string()),
        ("attempts", pa.int64()),
        ("started_ns", pa.int64()),
        ("ended_ns", pa.int64()),
        ("ending", pa.string()),
    ]
)


def unique_names(paths: list[Path]) -> dict[str, Path]:
    """A short name for each run: its folder, with as many parents as tell it from the others.

    Raises:
        TraceError: The same folder twice.
    """
    parts = [p.resolve().parts for p in paths]
    if len(set(parts)) < len(parts):
        twice = next(p for i, p in enumerate(paths) if parts[i] in parts[:i])
        raise TraceError(f"{twice} is given twice. Name each run once.")
    for depth in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise AssertionError("distinct absolute paths have distinct full names")


def layers_table(runs: Mapping[str, RunFiles]) -> pa.Table:
    """One row per (run, layer): what the lowest rank that has the layer says of it."""
    hints = get_type_hints(LayerInfo)
    columns = [("run", pa.string()), ("rank", pa.int32())]
    columns += [(f.name, _arrow(hints[f.name])) for f in fields(LayerInfo)]
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for name, files in runs.items():
        for rank, meta in sorted(files.metas.items()):
            for info in meta.layers:
                rows.setdefault((name, info.layer), {"run": name, "rank": rank, **asdict(info)})
    return pa.Table.from_pylist([rows[k] for k in sorted(rows)], pa.schema(columns))


def runs_table(runs: Mapping[str, RunFiles]) -> pa.Table:
    """One row per (run, rank)."""
    rows = []
    for name, files in runs.items():
        for rank, meta in sorted(files.metas.items()):
            last = meta.attempts[-1] if meta.attempts else None
            rows.append(
                {
                    "run": name,
                    "rank": rank,
                    "path": str(files.path.absolute()),
                    "run_id": meta.run_id,
                    "model": meta.model,
                    "world": meta.world,
                    "counts": meta.counts,
                    "sampling": meta.sampling,
                    "weights": meta.weights,
                    "attempts": len(meta.attempts),
                    "started_ns": meta.attempts[0].started_ns if meta.attempts else None,
                    "ended_ns": last.ended_ns if last else None,
                    "ending": last.end if last else None,
                }
            )
    return pa.Table.from_pylist(rows, RUNS)


def _arrow(hint: object) -> pa.DataType:
    """Arrow's type for `int`, `str | None` and the like."""
    options = getattr(hint, "__args__", (hint,))
    return next(_ARROW[t] for t in options if t in _ARROW)
