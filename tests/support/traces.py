"""Small traces for tests of the reading side, written with plain pyarrow to the schema.

`RUN` rows are plain dicts, so that a test can loop over what it wrote. Nothing here uses the writer
of the package: the two sides meet in the format alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.trace import layout
from moe_lens.trace.meta import Attempt, LayerInfo, Meta, write_meta
from moe_lens.trace.schema import with_keys

Rows = list[dict[str, Any]]

START_NS = 1_790_000_000_000_000_000


@dataclass
class Written:
    """A trace on disk, and the rows that went into it."""

    path: Path
    rows: dict[str, Rows] = field(default_factory=lambda: defaultdict(list))
    metas: dict[int, Meta] = field(default_factory=dict)


def arrow(table: str, rows: Rows, keys: tuple[str, ...] = ()) -> pa.Table:
    """Rows as the table's Arrow form; a column that a row lacks is 0, or null where it may be."""
    schema = with_keys(keys)[table].schema
    return pa.Table.from_pylist([complete(schema, row) for row in rows], schema)


def complete(schema: pa.Schema, row: dict[str, Any]) -> dict[str, Any]:
    return {f.name: row[f.name] if f.name in row else _empty(f) for f in schema}


def segment(
    run: Path, table: str, rows: Rows, *, rank: int = 0, seq: int = 0, keys: tuple[str, ...] = ()
) -> Path:
    """Seal rows the way the format says: temporary name, then rename."""
    path = layout.segment_path(run, table, rank, seq)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".seg-{seq:08d}.tmp")
    pq.write_table(arrow(table, rows, keys), temporary, store_schema=False)
    return temporary.replace(path)


def stream(
    run: Path, table: str, rows: Rows, *, rank: int = 0, seq: int = 0, batches: int = 1
) -> Path:
    """An open stream as a dead writer leaves it: no end-of-stream marker."""
    path = layout.stream_path(run, table, rank, seq)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = arrow(table, rows)
    size = max(1, -(-len(rows) // batches))
    with path.open("wb") as f:
        f.write(data.schema.serialize())
        for start in range(0, len(rows), size):
            f.write(data.slice(start, size).combine_chunks().to_batches()[0].serialize())
    return path


def meta(rank: int = 0, **changes: Any) -> Meta:
    """Meta of a closed recording of two layers of eight experts, top-2."""
    base: dict[str, Any] = {
        "run_id": "run-0",
        "rank": rank,
        "model": "TinyMoE",
        "layers": [layer_info(i) for i in range(2)],
        "attempts": [Attempt(0, START_NS, first_step=0, ended_ns=START_NS + 10**9, end="closed")],
        "sampling": "every sequence",
    }
    return Meta(**{**base, **changes})


def layer_info(layer: int, experts: int = 8, top_k: int | None = 2, **more: Any) -> LayerInfo:
    return LayerInfo(layer, f"model.layers.{layer}.mlp", experts, top_k, block=layer, **more)


def write_run(
    path: Path,
    *,
    layers: int = 2,
    experts: int = 8,
    zero_experts: int = 0,
    steps: int = 4,
    tokens: int = 32,
    tags: tuple[str, ...] = ("code", "prose"),
    phases: tuple[str, ...] = ("train", "eval"),
    ranks: tuple[int, ...] = (0,),
    world: int = 1,
    losses: bool = True,
    token_rows: bool = True,
    open_tables: tuple[str, ...] = (),
    seed: int = 0,
    **meta_changes: Any,
) -> Written:
    """A trace of one forward a step, whose counts follow from tokens routed at random.

    Training has a capacity and drops or reroutes what overflows; other phases do not. The tables in
    `open_tables` keep the rows of their last step in an open stream.
    """
    rng = random.Random(seed)
    written = Written(path)
    infos = [
        layer_info(i, experts, zero_experts=zero_experts, capacity_policy="drop-by-position")
        for i in range(layers)
    ]
    for rank in ranks:
        info = meta(rank, world=world, layers=infos, **meta_changes)
        write_meta(path, info)
        written.metas[rank] = info
        rows: dict[str, Rows] = defaultdict(list)
        for step in range(steps):
            phase = phases[step % len(phases)]
            _forward(rng, rows, step, phase, infos, tokens, tags, losses, token_rows)
        for table, found in rows.items():
            waiting = [r for r in found if table in open_tables and r["step"] == steps - 1]
            segment(path, table, [r for r in found if r not in waiting], rank=rank)
            if waiting:
                stream(path, table, waiting, rank=rank, seq=1, batches=2)
            written.rows[table] += [{"rank": rank, **r} for r in found]
    return written


def _forward(
    rng: random.Random,
    rows: dict[str, Rows],
    step: int,
    phase: str,
    infos: list[LayerInfo],
    tokens: int,
    tags: tuple[str, ...],
    losses: bool,
    token_rows: bool,
) -> None:
    window = {"attempt": 0, "window": step, "step": step, "phase": phase}
    tag_of = [tags[t % len(tags)] for t in range(tokens)]
    for info in infos:
        _layer(rng, rows, window, info, tag_of, token_rows)
    for tag in tags:
        n = tag_of.count(tag)
        loss = {"loss_sum": n * rng.uniform(1, 3), "loss_tokens": n} if losses else {}
        rows["slices"].append({**window, "tag": tag, "tokens": n, "sequences": 1, **loss})
    fires = len(infos)
    rows["steps"].append(
        {
            **window,
            "forward": 0,
            "t_start_ns": START_NS + step,
            "host_ns": 1000,
            "tokens": tokens,
            "padding_tokens": 3,
            "sampled": token_rows,
            "fires_expected": fires,
            "fires_seen": fires,
        }
    )
    if token_rows:
        rows["tokens"] += [
            {
                "attempt": 0,
                "step": step,
                "forward": 0,
                "stream": "main",
                "token": t,
                "sequence": 0,
                "position": t,
                "padding": False,
                "tag": tag_of[t],
            }
            for t in range(tokens)
        ]


def _layer(
    rng: random.Random,
    rows: dict[str, Rows],
    window: dict[str, Any],
    info: LayerInfo,
    tag_of: list[str],
    token_rows: bool,
) -> None:
    everyone = range(info.experts + info.zero_experts)
    capacity = 2 * len(tag_of) // info.experts + 2 if window["phase"] == "train" else None
    used: dict[int, int] = defaultdict(int)
    load: dict[tuple[str, int], dict[str, float]] = defaultdict(lambda: defaultdict(int))
    routers: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for token, tag in enumerate(tag_of):
        # a skew, and one expert (the last) that nobody chooses
        chosen: list[int] = []
        while len(chosen) < 2:
            expert = min(int(rng.expovariate(0.3)), len(everyone) - 2)
            if expert not in chosen:
                chosen.append(expert)
        served = 0
        for expert in chosen:
            row = load[tag, expert]
            row["routed"] += 1
            row["prob_sum"] += 0.25
            full = capacity is not None and expert < info.experts and used[expert] >= capacity
            used[expert] += not full
            served += not full
            row["processed"] += not full
            row["weight_sum"] += 0.5 * (not full)
            row["overflowed"] += full
            row["dropped"] += full
        r = routers[tag]
        r["tokens"] += 1
        r["unserved_tokens"] += served == 0
        r["entropy_sum"] += rng.uniform(0.5, 1.5)
        r["margin_sum"] += 0.125
        r["top1_prob_sum"] += 0.5
        r["zloss_sum"] += 4.0
        if token_rows:
            rows["routing"].append(
                {
                    **window,
                    "forward": 0,
                    "layer": info.layer,
                    "token": token,
                    "expert_ids": chosen,
                    "weights": [0.5, 0.5],
                    "entropy": 1.0,
                    "margin": 0.125,
                }
            )
    where = {**window, "layer": info.layer}
    rows["load"] += [{**where, "tag": t, "expert": e, **n} for (t, e), n in sorted(load.items())]
    rows["routers"] += [{**where, "tag": t, **n} for t, n in routers.items()]
    hottest = max(used, key=lambda e: used[e])
    rows["layers"].append(
        {
            **where,
            "forwards": 1,
            "tokens": len(tag_of),
            "padding_tokens": 3,
            "capacity": capacity,
            "max_load": used[hottest],
            "max_load_expert": hottest,
            "touched": sum(n > 0 for n in used.values()),
        }
    )


def _empty(f: pa.Field) -> Any:
    if f.nullable:
        return None
    if f.name in ("phase", "tag", "stream"):
        return {"phase": "train", "tag": "untagged", "stream": "main"}[f.name]
    if pa.types.is_list(f.type):
        return []
    if pa.types.is_boolean(f.type):
        return False
    return "" if pa.types.is_string(f.type) else 0
