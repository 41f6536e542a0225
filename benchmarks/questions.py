"""What each stored question costs on 24 million token-layers with every row kept.

A run of 48 layers x 128 experts x top-8, 1,000 forwards of one request of 500 tokens, goes through
the trace writer: a capacity of 1.25 filled in order of position (choices beyond it are dropped),
six tags, vocabulary ids, a loss for every token. Then every stored question is asked with its
defaults, and those that can be narrowed to one layer once more for the layer in the middle, in CPU
time of all threads. Gates: each question of one layer at most 500 ms, the heat map (`load_map`) at
most 300 ms, those of the dashboard's Overview together at most 800 ms (medians of their repeats).
`requests` is reported and not gated: it ranks every sequence of the run, whatever the layers.
`layer_transitions` reads two layers, and has the time of two.

Then runs of counts alone, 1,000 and 10,000 steps: Overview's questions together, and the heat map,
at most 3 times slower on the longer one.

    python benchmarks/questions.py [--quick] [RUN]

RUN: ask this trace instead, or write the generated one there and keep it. Forwards are drawn from
a pool of 32, and differ in their sequences and steps alone: what a question costs does not depend
on it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import Report, cpu_seconds, progress, scratch, table
from heat_map import write as write_counts
from numpy.typing import NDArray
from routing_generator import RoutingGenerator, Shape

import moe_lens
from moe_lens.queries.catalog import Question, questions
from moe_lens.queries.session import Trace
from moe_lens.trace.events import Forward, LayerCounts, Losses, SequenceRow
from moe_lens.trace.meta import Attempt, LayerInfo, Meta
from moe_lens.trace.writer import TraceWriter

OVERVIEW: list[tuple[str, dict[str, object]]] = [
    ("layer_balance", {}),
    ("dropped_tokens", {"by_tag": False}),
    ("router_confidence", {"by_tag": False}),
    ("dead_experts", {}),
    ("quality_by_tag", {}),
    ("capture_health", {}),
    ("all_to_all", {"every": None}),
    ("load_map", {}),
    ("load_over_time", {"every": None}),
]
"""What the dashboard's first page asks (views/overview.py); `every` as `RunInfo.every` says."""

POOL = 32
CAPACITY_FACTOR = 1.25
MIDDLE = {"expert": 5, "sequence": 400}
"""Values of parameters that name one thing among many."""


def write(run: Path, shape: Shape, forwards: int) -> None:
    """Write the run: every forward one request, every row kept."""
    pool = [capped(f, shape) for f in RoutingGenerator(shape).forwards(min(POOL, forwards))]
    progress("generated")
    layers = [
        LayerInfo(i, f"layers.{i}", shape.experts, shape.top_k, capacity_policy="drop-by-position")
        for i in range(shape.layers)
    ]
    meta = Meta("questions", layers=layers, sampling="all", attempts=[Attempt(0, 0)])
    writer = TraceWriter(run, meta)
    g = np.random.default_rng(shape.seed)
    like_types = 1 / np.arange(1, shape.token_types + 1)
    for step in range(forwards):
        like = pool[step % len(pool)]
        ids = g.choice(shape.token_types, shape.tokens, p=like_types / like_types.sum())
        sequence_N = np.full(shape.tokens, step, np.int64)
        tokens = replace(like.tokens[0], sequence_N=sequence_N, token_id_N=ids.astype(np.int32))
        forward = replace(
            like,
            step=step,
            t_start_ns=like.t_start_ns + step * 10**9,
            layers=[replace(x) for x in like.layers],  # the writer takes their rows away
            tokens=[tokens],
            sequences=[SequenceRow(step, like.sequences[0].tag, f"request {step}")],
        )
        writer.put(forward)
        loss_N = g.gamma(4.0, 0.6, shape.tokens).astype(np.float32)
        sums_G = like.tokens_G * float(loss_N.mean())
        writer.put(
            Losses(step, 0, like.tags, sums_G, like.tokens_G, sequence_N, tokens.position_N, loss_N)
        )
        if step % 10 == 9:
            writer.flush()  # rows are never given up, however slow the disk is
        if step % 100 == 99:
            progress(f"forward {step + 1} of {forwards}")
    writer.close()
    if writer.lost_rows or writer.breach_count:
        raise SystemExit(f"lost {writer.lost_rows} rows, breaches: {writer.take_breaches()}")


def capped(forward: Forward, shape: Shape) -> Forward:
    """The forward under a capacity filled in order of position."""
    room = int(np.ceil(CAPACITY_FACTOR * shape.tokens * shape.top_k / shape.experts))
    tag_T = forward.tokens[0].tag_N
    return replace(forward, layers=[_drop(x, room, tag_T, shape) for x in forward.layers])


def _drop(x: LayerCounts, room: int, tag_T: NDArray[np.int32], shape: Shape) -> LayerCounts:
    assert x.rows is not None  # every row is kept
    ids_TK = x.rows.expert_ids_NK
    chosen_TE = np.zeros((len(ids_TK), shape.experts), np.int64)
    np.put_along_axis(chosen_TE, ids_TK, 1, axis=1)
    # How many earlier tokens chose the same expert.
    before_TE = chosen_TE.cumsum(0) - chosen_TE
    dropped_TK = np.take_along_axis(before_TE, ids_TK, 1) >= room
    G, E = x.routed_GE.shape
    cell_TK = tag_T[:, None] * E + ids_TK
    dropped_GE = np.bincount(cell_TK[dropped_TK], minlength=G * E).reshape(G, E)
    kept = ~dropped_TK
    weight = np.bincount(cell_TK[kept], x.rows.weights_NK[kept], minlength=G * E)
    return replace(
        x,
        processed_GE=x.routed_GE - dropped_GE,
        overflowed_GE=dropped_GE,
        dropped_GE=dropped_GE,
        unserved_G=np.bincount(tag_T[dropped_TK.all(1)], minlength=G),
        weight_sum_GE=weight.reshape(G, E),
        capacity=room,
        rows=replace(x.rows, dropped_NK=dropped_TK),
    )


def one_layer(asked: Question, layer: int) -> dict[str, int] | None:
    """The parameters that narrow a question to one layer; None if it has none of them."""
    known = {p.name for p in asked.parameters}
    if "layer" in known:
        return {"layer": layer}
    if {"first_layer", "last_layer"} <= known:
        return {"first_layer": layer, "last_layer": layer}
    return None


def works(layer: int) -> dict[str, tuple[str, dict[str, int]]]:
    """What is asked: title -> (question, parameters)."""
    out: dict[str, tuple[str, dict[str, int]]] = {}
    for name, asked in questions().items():
        if name.startswith("diff_"):
            continue  # they compare two runs
        some = {p.name: MIDDLE[p.name] for p in asked.parameters if p.name in MIDDLE}
        narrow = one_layer(asked, layer)
        if narrow is None or "layer" not in narrow:
            out[name] = (name, some)
        if narrow is not None:
            out[f"{name}, one layer"] = (name, some | narrow)
    return out


def overview(trace: Trace, repeats: int) -> float:
    """CPU ms of Overview's questions together, the median of the repeats."""
    every = trace.info().runs[0].every()

    def ask() -> None:
        for name, parameters in OVERVIEW:
            trace.query(name, **{k: every if v is None else v for k, v in parameters.items()})

    ask()
    return 1e3 * statistics.median(cpu_seconds(ask) for _ in range(repeats))


def longer(report: Report, steps: tuple[int, int], repeats: int) -> None:
    """How much more runs of ten times the steps cost."""
    found: dict[int, tuple[float, float]] = {}
    with scratch() as folder:
        for n in steps:
            write_counts(folder / str(n), Shape(), n)
            progress(f"{n} steps written")
            with moe_lens.open(folder / str(n)) as trace:
                trace.query("load_map")
                map_ms = [cpu_seconds(lambda: trace.query("load_map")) for _ in range(repeats)]
                found[n] = (overview(trace, repeats), 1e3 * statistics.median(map_ms))
    few, many = (found[n] for n in steps)
    table(
        ["CPU ms", *(f"{n:,} steps" for n in steps)],
        [[k, f"{few[i]:.0f}", f"{many[i]:.0f}"] for i, k in enumerate(("Overview", "load_map"))],
    )
    report.numbers["by_steps"] = {
        str(n): {"overview": o, "load_map": m} for n, (o, m) in found.items()
    }
    report.gate("Overview, ten times the steps", many[0] / few[0], at_most=3)
    report.gate("load_map, ten times the steps", many[1] / few[1], at_most=3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run less, write no result")
    parser.add_argument("run", nargs="?", type=Path, help="trace to ask, or to write and keep")
    arguments = parser.parse_args()
    quick = arguments.quick
    shape = Shape(requests=1, positions=500, tagged=True)
    forwards, repeats = (80, 2) if quick else (1000, 5)
    setup = shape.described() | {"forwards": forwards, "capacity_factor": CAPACITY_FACTOR}
    report = Report("questions", setup, ("duckdb",))
    taken: dict[str, list[float]] = {}
    rows: dict[str, int] = {}
    with ExitStack() as stack:
        run = arguments.run or stack.enter_context(scratch()) / "run"
        if not run.exists():
            write(run, shape, forwards)
        trace: Trace = stack.enter_context(moe_lens.open(run))
        together = overview(trace, repeats)
        report.numbers["overview_cpu_ms"] = together
        report.gate("Overview's questions together, CPU ms", together, at_most=800)
        for title, (name, parameters) in works(shape.layers // 2).items():
            rows[title] = len(trace.query(name, **parameters))  # warm: the files are in the cache
            taken[title] = [
                cpu_seconds(lambda: trace.query(name, **parameters))  # noqa: B023
                for _ in range(repeats)
            ]
    middle = {title: 1e3 * statistics.median(t) for title, t in taken.items()}
    table(
        ["CPU ms", "best", "median", "rows"],
        [[k, f"{1e3 * min(taken[k]):.0f}", f"{middle[k]:.0f}", f"{rows[k]:,}"] for k in taken],
    )
    report.numbers["questions"] = {
        k: {"best_cpu_ms": 1e3 * min(t), "median_cpu_ms": middle[k], "rows": rows[k]}
        for k, t in taken.items()
    }
    for title, ms in middle.items():
        if title.endswith(", one layer") and not title.startswith("requests"):
            layers = 2 if title.startswith("layer_transitions") else 1
            report.gate(f"{title}, CPU ms", ms, at_most=500 * layers)
    report.gate("load_map, CPU ms", middle["load_map"], at_most=300)
    longer(report, (80, 800) if quick else (1000, 10_000), repeats)
    return report.finish(keep=not quick and arguments.run is None)


if __name__ == "__main__":
    sys.exit(main())
