"""Does the granularity laboratory find what arXiv 2505.06839 claims, and how long does it take?

The preset `quick` with two seeds, `relu` with one: errors of students that use 8, 4, 2 and 1
experts a token, and of some that use 2 but are wider or have more of them. Then, without training:
regions into which 200 random routers of each size cut the circle and the square, and the sets of
experts that random routers reach.

All but the CPU time is the same on every machine but for rounding: bounds are of errors and counts.

    python benchmarks/granularity.py [--quick]
"""

from __future__ import annotations

import os
import resource
import sys
import time
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as moe-lens lab does

import numpy as np
import torch
from _common import Report, is_quick, machine, progress, table

from moe_lens.granularity.configurations import of_random_router
from moe_lens.granularity.findings import Record, gap, sweeps
from moe_lens.granularity.partition import in_square, on_circle
from moe_lens.granularity.presets import plan
from moe_lens.granularity.side_by_side import executed

ABOVE = {1: 0.28, 2: 0.18, 4: 0.10}
SAME_BELOW = 0.02
CPU_SECONDS = 360.0
"""Of the preset `quick`: three minutes on two cores."""
SETS = {2: 24, 4: 428, 8: 3_874, 32: 12_067}
"""Of 16 experts, 8 a token, among 200,000 tokens, by hidden size."""
CIRCLE = {
    (4, 2): (4, 6), (8, 4): (8, 10), (16, 8): (18, 22), (32, 16): (38, 48), (64, 8): (46, 54),
    (16, 1): (5, 7), (16, 2): (9, 13),
}  # fmt: skip
"""From the least to the most regions of five draws, by experts and experts a token."""
SQUARE = ((4, 2), (8, 4), (16, 8), (16, 1), (16, 2))
"""Affine routers; there is nothing to hold these against but one draw of 4/2 and of 8/4 (4, 11)."""
DRAWS = 200
ROUTERS = 50
"""Of which the median counts: at d = 2 and 4, routers differ much from each other."""


def trained(preset: str, seed: int, steps: int | None) -> tuple[list[Record], list[Record], float]:
    """Experiments 1 and 2 of a preset, and the CPU seconds they took."""
    planned = plan(preset, seed=seed, steps=steps)
    before, start = _cpu(), time.perf_counter()
    by_name = {}
    for row in executed(planned.runs, planned.recipe, workers=machine()["cores"]):
        progress(f"{preset}, seed {seed}: {row.name}: {row.nmse:.3g} ({row.seconds:.0f} s)")
        by_name[row.name] = row
    rows = [by_name[run.name] for run in planned.runs]
    progress(f"{preset}, seed {seed}: {time.perf_counter() - start:.0f} s")
    return gap(planned, rows), sweeps(planned, rows), _cpu() - before


def _cpu() -> float:
    """CPU seconds of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def show(title: str, gaps: list[Record], swept: list[Record]) -> None:
    print(f"\n{title}")
    rows = [["active parameters", *_cells(row)] for row in gaps]
    rows += [[f"{row['swept']} x{row['factor']:g}", *_cells(row)] for row in swept]
    table(["equal", "student", "width", "error", "affine", "zero", "FVU", "sets", "s"], rows)


def _cells(row: Record) -> list[str]:
    return [
        row["student"], str(row["width"]), f"{row['nmse']:.3g}", f"{row['affine_nmse']:.3f}", "1",
        f"{row['fvu']:.3g}", str(row["sets_used"]), f"{row['seconds']:.1f}",
    ]  # fmt: skip


def quick_preset(report: Report, seed: int, steps: int | None) -> None:
    gaps, swept, seconds = trained("quick", seed, steps)
    show(f"quick, seed {seed} (linear experts)", gaps, swept)
    report.numbers[f"quick_seed_{seed}"] = {"gap": gaps, "sweeps": swept, "cpu_s": seconds}
    error = {row["top_k"]: row["nmse"] for row in gaps}
    named = f"linear, seed {seed}"
    least = min(error[low] - error[high] for low, high in ((1, 2), (2, 4), (4, 8)))
    report.gate(f"{named}: least step from k' = 1 to 2 to 4 to 8", least, at_least=1e-9)
    for top_k, bound in ABOVE.items():
        report.gate(f"{named}: error of k' = {top_k}", error[top_k], at_least=bound)
    report.gate(f"{named}: error of k' = 8", error[8], at_most=SAME_BELOW)
    affine = gaps[0]["affine_nmse"]
    report.gate(f"{named}: error of the affine map", affine, at_least=0.35)
    report.gate(f"{named}: the same", affine, at_most=0.37)
    for row in swept:
        if row["swept"] == "width" and row["factor"] in (4, 16):
            change = abs(row["nmse"] / error[2] - 1)
            what = f"{named}: change of k' = 2 by width x{row['factor']:g}"
            report.gate(what, change, at_most=0.05)
    report.gate(f"quick, seed {seed}: CPU s", seconds, at_most=CPU_SECONDS)


def relu_preset(report: Report, steps: int | None) -> None:
    gaps, swept, seconds = trained("relu", 0, steps)
    show("relu, seed 0", gaps, swept)
    report.numbers["relu_seed_0"] = {"gap": gaps, "sweeps": swept, "cpu_s": seconds}
    error = {row["top_k"]: row["nmse"] for row in gaps}
    report.gate("ReLU, seed 0: error of k' = 8", error[8], at_most=0.06)
    report.gate("ReLU, seed 0: error of k' = 4", error[4], at_least=0.09)


def regions(report: Report, draws: int) -> None:
    """The median of many draws lies within what five gave."""
    found: dict[str, list[int]] = {}
    for experts, top_k in CIRCLE:
        found[f"circle {experts}/{top_k}"] = [
            len(on_circle(_drawn(experts, draw)[0], top_k)) for draw in range(draws)
        ]
    for experts, top_k in SQUARE:
        found[f"square {experts}/{top_k}"] = [
            len(in_square(*_drawn(experts, draw), top_k)) for draw in range(draws)
        ]
    spread = {name: np.percentile(counts, [0, 5, 50, 95, 100]) for name, counts in found.items()}
    print(f"\nregions of {draws} random routers of two inputs")
    rows = [[name, *(f"{each:g}" for each in of)] for name, of in spread.items()]
    table(["router", "least", "5 %", "median", "95 %", "most"], rows)
    report.numbers["regions"] = {name: of.tolist() for name, of in spread.items()}
    for (experts, top_k), (low, high) in CIRCLE.items():
        middle = float(spread[f"circle {experts}/{top_k}"][2])
        report.gate(f"regions of the circle, {experts}/{top_k}, median", middle, at_least=low)
        report.gate("the same", middle, at_most=high)


def _drawn(experts: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(draw)
    return random.normal(size=(experts, 2)), random.normal(size=experts)


def realised_sets(report: Report, seeds: int) -> None:
    rows = []
    for hidden, expected in SETS.items():
        used = [
            of_random_router(16, 8, hidden, tokens=200_000, seed=seed).used for seed in range(seeds)
        ]
        middle = median(used)
        rows.append([str(hidden), str(min(used)), f"{middle:g}", str(max(used)), str(expected)])
        report.numbers[f"sets_16e8a_d{hidden}"] = used
        off = abs(middle / expected - 1)
        report.gate(f"sets of 16e8a at d = {hidden}, off {expected:,}", off, at_most=0.1)
    print(f"\nsets among 200,000 tokens, of {seeds} random routers with 16 experts, 8 a token")
    table(["d", "least", "median", "most", "expected"], rows)


def main() -> int:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)  # as moe-lens lab does: students run side by side instead
    steps = 40 if quick else None
    report = Report(
        "granularity",
        {"seeds": [0, 1], "relu_seed": 0, "draws": DRAWS, "routers": ROUTERS},
        ("torch",),
    )
    regions(report, 20 if quick else DRAWS)
    realised_sets(report, 1 if quick else ROUTERS)
    for seed in (0,) if quick else (0, 1):
        quick_preset(report, seed, steps)
    relu_preset(report, steps)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
