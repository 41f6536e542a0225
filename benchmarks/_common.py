"""What the benchmarks share: fair pairs in CPU time, the machine in words, results as dated JSON.

Cores are shared and noisy, so nothing here is wall time: a figure is the CPU time of this process
(all its threads), and a gate is on a ratio of two things that took turns in one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process, all its threads, spent in `work`."""
    before = time.process_time()
    work()
    return time.process_time() - before


@dataclass
class Pairs:
    """CPU seconds of two things that took turns."""

    first: list[float]
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.first, self.second, strict=True)]

    @property
    def ratio(self) -> float:
        """Second over first: the median of the pairs."""
        return statistics.median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        return {
            "median_ratio": self.ratio,
            "ratios": [round(r, 4) for r in self.ratios],
            "first_cpu_s": statistics.median(self.first),
            "second_cpu_s": statistics.median(self.second),
        }


def interleaved(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int, *, warm_up: int = 1
) -> Pairs:
    """CPU time of both, in turns; who begins changes from round to round."""
    for _ in range(warm_up):
        first()
        second()
    pairs = Pairs([], [])
    gc.collect()
    for i in range(rounds):
        turns = [(first, pairs.first), (second, pairs.second)]
        for work, taken in turns if i % 2 == 0 else reversed(turns):
            taken.append(cpu_seconds(work))
    return pairs


def machine() -> dict[str, Any]:
    """The processor and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "system": platform.system()}


def versions(*packages: str) -> dict[str, str]:
    """Python, numpy, pyarrow, and what else took part."""
    names = ("numpy", "pyarrow", *packages)
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}


@dataclass
class Report:
    """One script's numbers: a printed table, gates, and a dated JSON file.

    Args:
        script: Name of the script, without `.py`.
        setup: What was run, generator and seed included.
        packages: Whose versions count, beside numpy and pyarrow.
    """

    script: str
    setup: dict[str, Any]
    packages: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)

    def gate(
        self,
        name: str,
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A number that must not be above, or below, a bound."""
        passed = at_most is None or value <= at_most
        passed &= at_least is None or value >= at_least
        bound = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
        self.gates.append({"name": name, "value": value, "bound": bound, "passed": passed})

    def finish(self, *, keep: bool) -> int:
        """Print the gates; write the JSON file if `keep`. Returns the exit status."""
        print()
        table(
            ["gate", "measured", "bound", ""],
            [
                [g["name"], f"{g['value']:.4g}", g["bound"], "ok" if g["passed"] else "FAILED"]
                for g in self.gates
            ],
        )
        now = datetime.now(UTC)
        result = {
            "script": f"benchmarks/{self.script}.py",
            "date": now.isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(*self.packages),
            "setup": self.setup,
            "gates": self.gates,
            "numbers": self.numbers,
        }
        if keep:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self.script}-{now:%Y-%m-%d}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"written: benchmarks/results/{path.name}")
        return 0 if all(g["passed"] for g in self.gates) else 1


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in (head, ["-" * w for w in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def is_quick(doc: str | None) -> bool:
    """Read the command line: `--quick` runs less, prints, and keeps no result."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run less, write no result")
    return bool(parser.parse_args().quick)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for traces, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="moe_lens-bench-") as name:
        yield Path(name)


def progress(text: str) -> None:
    """What is going on, for whoever waits (not part of the table)."""
    print(text, file=sys.stderr, flush=True)
