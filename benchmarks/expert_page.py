"""How long the dashboard takes to open an expert on 24 million token-layers with every row kept.

The run of `questions.py` (48 layers x 128 experts x top-8, 1,000 forwards of 500 tokens), the
dashboard as a process, Debian's Chromium: cells of the experts' heat map are clicked one after
another, each in another layer, so that no answer is known yet. Measured from the click until the
expert stands below the map with every chart drawn, in wall time, since this is what somebody waits:
on a busy machine it says more of the machine. Gate: the median at most 1.5 s. Beside it the same
experts again, whose answers the dashboard remembers: what drawing alone takes.

    python benchmarks/expert_page.py [--quick] [RUN]

RUN: a run that `questions.py RUN` wrote. Needs chromium (`make chromium`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from _common import Report, progress, scratch, table
from questions import write
from routing_generator import Shape
from support.dashboard import MAP, browser, click_cell, expert_opened, served, settled

WARM_UP = 2
"""Experts opened before it counts: the first of a process compiles and imports."""


# Charts are changed in place: each says when it was painted anew.
_OTHERS = f"""[...document.querySelectorAll('.js-plotly-plot')].filter(p => !p.matches('{MAP}'))"""
_ARM = f"""() => {{
  for (const plot of {_OTHERS}) {{
    if (plot.painted === undefined) plot.on("plotly_afterplot", () => {{ plot.painted = true; }});
    plot.painted = false;
  }}
}}"""
_PAINTED = f"() => {_OTHERS}.every(plot => plot.painted !== false)"


def opened(page: Any, layer: int, expert: int) -> float:
    """Seconds from the click on a cell until its expert is drawn."""
    click = click_cell(page, layer, expert)
    page.evaluate(_ARM)
    began = time.perf_counter()
    click()
    expert_opened(page, layer, expert)
    page.wait_for_function(_PAINTED)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run less, write no result")
    parser.add_argument("run", nargs="?", type=Path, help="trace written by questions.py")
    arguments = parser.parse_args()
    shape = Shape(requests=1, positions=500, tagged=True)
    forwards, times = (80, 3) if arguments.quick else (1000, 9)
    report = Report(
        "expert_page", shape.described() | {"forwards": forwards}, ("duckdb", "streamlit", "plotly")
    )
    with ExitStack() as stack:
        run = arguments.run or stack.enter_context(scratch()) / "run"
        if not run.exists():
            write(run, shape, forwards)
        address = stack.enter_context(served(run))
        chromium = stack.enter_context(browser())
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(90_000)
        page.goto(f"{address}/experts")
        settled(page)
        cells = [(2 + 3 * i, (37 * i) % shape.experts) for i in range(WARM_UP + times)]
        progress(f"load before: {os.getloadavg()[0]:.1f}")
        first = [opened(page, *cell) for cell in cells][WARM_UP:]
        again = [opened(page, *cell) for cell in cells][WARM_UP:]
        load = os.getloadavg()[0]
    found = {"first time": first, "remembered": again}
    table(
        ["seconds", "best", "median", "worst"],
        [
            [k, *(f"{x:.2f}" for x in (min(v), statistics.median(v), max(v)))]
            for k, v in found.items()
        ],
    )
    print(f"load average {load:.1f} on {os.cpu_count()} cores")
    report.numbers |= {k: [round(x, 3) for x in v] for k, v in found.items()}
    report.numbers["load_average"] = load
    report.gate("an expert drawn after a click, s", statistics.median(first), at_most=1.5)
    return report.finish(keep=not arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
