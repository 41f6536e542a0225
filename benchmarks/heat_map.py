"""What the heat map of a long run costs: layers x experts, summed over 1,000 steps of `load`.

A run of 48 layers x 128 experts x top-8 with counts alone goes through the trace writer, one window
a step (6.1 million rows of `load`). Then, in CPU time of all threads: opening the run, the heat map
as plain SQL, and the stored questions that reports and dashboards ask. Gate: the plain sum at most
300 ms (the median of its repeats).

    python benchmarks/heat_map.py [--quick]

Counts of a step are drawn from a multinomial around the mean of a few generated forwards: that is
how often each expert is chosen, without choosing 4,096 tokens x 48 layers x 1,000 steps.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import Report, cpu_seconds, is_quick, progress, scratch, table
from routing_generator import RoutingGenerator, Shape

import moe_lens
from moe_lens.queries.session import Trace
from moe_lens.trace.meta import Attempt, LayerInfo, Meta
from moe_lens.trace.writer import TraceWriter

HEAT_MAP = "select layer, expert, sum(routed) as routed from load group by layer, expert"
QUESTIONS = ("load_map", "expert_load", "layer_balance")


def write(run: Path, shape: Shape, steps: int) -> int:
    """A run of counts alone; the number of choices in it."""
    pool = list(RoutingGenerator(shape).forwards(4, rows=False))
    share_LE = np.array(
        [
            sum(f.layers[i].routed_GE[0] for f in pool) / (len(pool) * shape.tokens * shape.top_k)
            for i in range(shape.layers)
        ]
    )
    layers = [
        LayerInfo(i, f"layers.{i}.mlp", shape.experts, shape.top_k) for i in range(shape.layers)
    ]
    writer = TraceWriter(run, Meta("heat map", layers=layers, attempts=[Attempt(0, 0)]))
    g = np.random.default_rng(shape.seed)
    for step in range(steps):
        like = pool[step % len(pool)]
        routed_LE = g.multinomial(shape.tokens * shape.top_k, share_LE)
        counts = []
        for x, routed_E in zip(like.layers, routed_LE, strict=True):
            # Sums go along with the counts they belong to.
            scale_GE = routed_E[None] / np.maximum(x.routed_GE, 1)
            counts.append(
                replace(
                    x,
                    routed_GE=routed_E[None].copy(),
                    processed_GE=routed_E[None].copy(),
                    weight_sum_GE=x.weight_sum_GE * scale_GE,
                    prob_sum_GE=x.prob_sum_GE * scale_GE,  # type: ignore[operator]
                )
            )
        writer.put(replace(like, step=step, layers=counts))
    writer.close()
    if writer.breach_count:
        raise SystemExit(f"breaches: {writer.take_breaches()}")
    return steps * shape.layers * shape.tokens * shape.top_k


def main() -> int:
    quick = is_quick(__doc__)
    shape = Shape(positions=64) if quick else Shape()
    steps, repeats = (100, 3) if quick else (1000, 9)
    report = Report("heat_map", shape.described() | {"steps": steps}, ("duckdb",))
    opened: list[Trace] = []

    def open_again() -> None:
        for trace in opened:
            trace.close()
        opened[:] = [moe_lens.open(run)]

    with scratch() as folder:
        run = folder / "run"
        choices = write(run, shape, steps)
        progress("written")
        taken = {"open": [cpu_seconds(open_again) for _ in range(repeats)]}
        trace = opened[0]
        answer = trace.sql(HEAT_MAP).arrow()
        total = sum(answer.column("routed").to_pylist())
        if answer.num_rows != shape.layers * shape.experts or total != choices:
            raise SystemExit(f"wrong answer: {answer.num_rows} cells, {total} of {choices} choices")
        works: dict[str, Callable[[], object]] = {"heat map": lambda: trace.sql(HEAT_MAP)}
        known = trace.questions()
        works |= {q: lambda q=q: trace.query(q) for q in QUESTIONS if q in known}
        for name, work in works.items():
            taken[name] = [cpu_seconds(work) for _ in range(repeats)]
        trace.close()
    table(
        ["CPU ms", "best", "median", "worst"],
        [
            [name, *(f"{1e3 * f(t):.0f}" for f in (min, statistics.median, max))]
            for name, t in taken.items()
        ],
    )
    for name, t in taken.items():
        report.numbers[name] = {
            "best_cpu_ms": 1e3 * min(t),
            "median_cpu_ms": 1e3 * statistics.median(t),
        }
    report.gate("heat map, CPU ms", 1e3 * statistics.median(taken["heat map"]), at_most=300)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
