"""What every metric of the catalogue costs on 24 million token-layers with every row kept.

The run of `questions.py` (48 layers x 128 experts x top-8, 1,000 forwards of 500 tokens, six tags,
losses, vocabulary ids), `moe-lens analyze RUN --json` as a process of its own: its CPU time, all
threads, and the most memory it held. Gates: 60 s and 4 GB. Beside it each group alone on the layer
in the middle, with what reading that layer costs in it.

    python benchmarks/analyze.py [--quick] [RUN]

RUN: a run that `questions.py RUN` wrote.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from _common import Report, cpu_seconds, progress, scratch, table
from questions import write
from routing_generator import Shape

from moe_lens.metrics.catalogue import GROUPS, Metric, measure, metrics
from moe_lens.queries.evidence import evidence
from moe_lens.queries.session import Trace, one_run, open_trace


def whole(run: Path) -> tuple[float, float, int]:
    """CPU seconds and peak GB of the command, and how many values it gave."""
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "moe_lens", "analyze", str(run), "--json"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=out, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        out.seek(0)
        phases = json.load(out)
    values = sum(
        not said["lacks"] for p in phases for row in p["layers"] for said in row["metrics"].values()
    )
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, after.ru_maxrss * 1024 / 1e9, values  # Linux counts in KiB


def of_group(trace: Trace, asked: list[Metric]) -> float:
    """CPU seconds of these metrics on the layer in the middle."""
    run = one_run(trace)
    info = run.layers[len(run.layers) // 2]

    def work() -> None:
        known = evidence(trace, run, info, run.phases[0], asked)
        for each in asked:
            measure(each, known)

    work()
    return min(cpu_seconds(work) for _ in range(3))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run less, write no result")
    parser.add_argument("run", nargs="?", type=Path, help="trace written by questions.py")
    arguments = parser.parse_args()
    shape = Shape(requests=1, positions=500, tagged=True)
    forwards = 80 if arguments.quick else 1000
    report = Report("analyze", shape.described() | {"forwards": forwards}, ("duckdb", "numpy"))
    with ExitStack() as stack:
        run = arguments.run or stack.enter_context(scratch()) / "run"
        if not run.exists():
            write(run, shape, forwards)
        cpu_s, peak_gb, values = whole(run)
        progress(f"{values:,} values in {cpu_s:.1f} s of CPU, at most {peak_gb:.2f} GB")
        trace = stack.enter_context(open_trace(run))
        by_group = {
            group: of_group(trace, [m for m in metrics().values() if m.group == group])
            for group in GROUPS
        }
    table(["group", "CPU s a layer"], [[k, f"{v:.2f}"] for k, v in by_group.items()])
    report.numbers |= {
        "cpu_s": cpu_s, "peak_gb": peak_gb, "values": values, "group_cpu_s_a_layer": by_group,
    }  # fmt: skip
    report.gate("every metric, CPU s", cpu_s, at_most=60)
    report.gate("peak memory, GB", peak_gb, at_most=4)
    return report.finish(keep=not arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
