"""What placing experts takes, in CPU time of one process.

A plan of each method for 58 layers of 256 experts on 32 ranks (4 nodes, 32 replicas, 8 groups),
with Zipf-distributed load: at most 2 s. And ten placements judged over a run of 1,000 forwards of
48 layers of 128 experts, top-8, 256 tokens a forward: reading the run's counts, fitting ten plans
to the earlier half, the ranks' rows in every layer of every forward of the later half, and what
20,000 tokens of each layer send, as `moe-lens place` does it: at most 30 s.

    python benchmarks/placement.py [--quick]
"""

from __future__ import annotations

import sys

import numpy as np
from _common import Report, cpu_seconds, is_quick, progress, scratch, table

from moe_lens.replay.placement.choices import choices_of, together_of
from moe_lens.replay.placement.counts import counts_of, rows_of
from moe_lens.replay.placement.fit import Group, placed
from moe_lens.replay.placement.methods import METHODS, place
from moe_lens.replay.placement.what_if import balances, divided, traffic_of
from moe_lens.trace import synthetic
from moe_lens.trace.reader import RunFiles, open_run

LAYERS, EXPERTS, RANKS, REPLICAS, NODES, GROUPS = 58, 256, 32, 32, 4, 8
WHAT_IF = [
    (method, Group(ranks, replicas, nodes))
    for method, replicas in (("contiguous", 0), ("lpt", 0), ("eplb", 16), ("affinity", 0))
    for ranks, nodes in ((8, 1), (16, 2))
] + [("eplb", Group(32, 32, 4)), ("lpt", Group(32, 32, 4))]


def plans(report: Report) -> None:
    """CPU seconds of a plan."""
    random = np.random.default_rng(0)
    weights_LE = random.permuted(np.tile(1e6 / np.arange(1, EXPERTS + 1), (LAYERS, 1)), axis=1)
    together_LEE = random.random((LAYERS, EXPERTS, EXPERTS))
    together_LEE += together_LEE.transpose(0, 2, 1)
    rows = []
    for method in METHODS:
        seconds = min(
            cpu_seconds(
                lambda method=method: place(
                    method,
                    weights_LE,
                    tuple(range(LAYERS)),
                    ranks=RANKS,
                    replicas=REPLICAS,
                    nodes=NODES,
                    groups=GROUPS,
                    together_LEE=together_LEE,
                )
            )
            for _ in range(3)
        )
        rows.append([method, f"{seconds:.3f}"])
        report.numbers[f"plan_{method}_cpu_s"] = seconds
        report.gate(f"{method}: 58 x 256 on 32 ranks, CPU s", seconds, at_most=2)
    table(["plan", "CPU s"], rows)


def what_if(report: Report, files: RunFiles) -> None:
    """CPU seconds of ten placements judged."""
    parts: dict[str, float] = {}

    def judge() -> None:
        counts = counts_of(files)
        earlier, later = divided(counts)
        rows = rows_of(files, counts.infos)
        together = together_of(choices_of(rows, earlier), earlier)
        made = [placed(method, group, earlier, together) for method, group in WHAT_IF]
        parts["balance"] = cpu_seconds(lambda: [balances(later, plan) for plan in made])
        choices = choices_of(rows, later)
        assert choices is not None
        parts["traffic"] = cpu_seconds(
            lambda: [traffic_of(choices, later.infos, plan) for plan in made]
        )

    parts["all"] = cpu_seconds(judge)
    parts["reading and fitting"] = parts["all"] - parts["balance"] - parts["traffic"]
    print()
    table(["ten placements", "CPU s"], [[name, f"{s:.2f}"] for name, s in parts.items()])
    report.numbers["what_if_cpu_s"] = parts
    report.gate("ten placements, 1,000 forwards of 48 x 128, CPU s", parts["all"], at_most=30)


def main() -> int:
    quick = is_quick(__doc__)
    spec = synthetic.Spec(
        layers=4 if quick else 48,
        experts=128,
        top_k=8,
        steps=50 if quick else 1000,
        sequences=4,
        length=64,
        popularity="zipf",
        groups=8,
    )
    report = Report("placement", {"seed": 0, "layers": spec.layers, "forwards": spec.steps})
    plans(report)
    with scratch() as folder:
        progress("writing a run …")
        synthetic.generate(folder / "run", spec)
        progress("judging ten placements …")
        what_if(report, open_run(folder / "run"))
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
