"""Tables made of meta files: `moe_layers` (how routers are configured), `moe_experts`, `runs`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import numpy as np
import pyarrow as pa

from moe_lens.errors import TraceError
from moe_lens.metrics.subsets import reachable
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
    columns += [
        (f.name, _arrow(hints[f.name])) for f in fields(LayerInfo) if f.name != "identities"
    ]
    columns.append(("reachable_bits", pa.float64()))
    rows = [
        {"run": name, "rank": rank, **asdict(info), "reachable_bits": reachable_bits(info)}
        for name, rank, info in _layers(runs)
    ]
    return pa.Table.from_pylist(rows, pa.schema(columns))


EXPERTS = pa.schema(
    [("run", pa.string()), ("layer", pa.int32()), ("expert", pa.int32()), ("identity", pa.string())]
)


def experts_table(runs: Mapping[str, RunFiles]) -> pa.Table:
    """One row per (run, layer, expert): whose weights it runs. Zero-compute experts have none."""
    layers = list(_layers(runs))
    size = [info.experts for _, _, info in layers]
    run, layer = [name for name, _, _ in layers], [info.layer for _, _, info in layers]
    at = np.repeat(np.arange(len(layers)), size)
    columns = {
        "run": pa.array(run, pa.string()).take(pa.array(at)),
        "layer": pa.array(layer, pa.int32()).take(pa.array(at)),
        "expert": pa.array(np.concatenate([np.arange(n) for n in (0, *size)]), pa.int32()),
        "identity": pa.array([x for _, _, info in layers for x in info.named], pa.string()),
    }
    return pa.table(columns, EXPERTS)


def _layers(runs: Mapping[str, RunFiles]) -> Iterator[tuple[str, int, LayerInfo]]:
    """Every layer of every run, by its lowest rank that has it."""
    found: dict[tuple[str, int], tuple[str, int, LayerInfo]] = {}
    for name, files in runs.items():
        for rank, meta in sorted(files.metas.items()):
            for info in meta.layers:
                found.setdefault((name, info.layer), (name, rank, info))
    yield from (found[k] for k in sorted(found))


def reachable_bits(info: LayerInfo) -> float | None:
    """log2 of the sets of experts that a token can choose; None where their size is not fixed."""
    if info.top_k is None or info.zero_experts or info.contradiction is not None:
        return None
    groups = info.groups or 1
    sets = _reachable(info.experts, info.top_k, groups, info.top_groups or groups)
    return math.log2(sets) if sets else None


@lru_cache(maxsize=256)
def _reachable(experts: int, top_k: int, groups: int, top_groups: int) -> int:
    return reachable(experts, top_k, groups, top_groups) if top_k <= experts else 0


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
