"""`kill -9` at random moments, 50 times.

A child process records made-up routing (every fifth time through `record`, else through the trace
writer), flushes now and then and says what was flushed; it seals every six steps, so that kills
meet sealing too. It is killed at a random moment. Then: DuckDB reads the trace, every flushed step
is there with its exact counts and rows, and nothing that is there is wrong; `recover` changes
nothing that is read; a resumed recording goes on and supersedes what had not been flushed. Gate:
all of it, every time.

    python benchmarks/kill.py [--quick]

The child and the questions are in `tests/support/killed.py`, which the tests use too.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from _common import Report, is_quick, progress, scratch, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.killed import SEAL_ROWS, kill_once

SEED = 2026


def main() -> int:
    quick = is_quick(__doc__)
    times = 10 if quick else 50
    setup = {"generator": "tests/support/killed.py", "seed": SEED, "kills": times}
    report = Report("kill", setup | {"seal_rows": SEAL_ROWS}, ("duckdb", "torch"))
    outcomes = []
    with scratch() as folder:
        for i in range(times):
            mode = "record" if i % 5 == 4 else "writer"
            outcomes.append(kill_once(folder / f"run{i}", SEED + i, mode))
            progress(f"kill {i + 1} of {times}: {'; '.join(outcomes[-1].wrong) or 'all is there'}")
    good = sum(not x.wrong for x in outcomes)
    lines = {
        "kills": times,
        "nothing flushed was lost": good,
        "of these through record": sum(x.mode == "record" for x in outcomes),
        "steps flushed": sum(x.flushed for x in outcomes),
        "steps there though not flushed": sum(x.found - x.flushed for x in outcomes),
        "segments sealed": sum(x.sealed for x in outcomes),
        "kills in the middle of sealing": sum(x.sealing for x in outcomes),
        "kills in the middle of an append": sum(x.torn for x in outcomes),
    }
    table(["over all kills", ""], [[name, f"{n:,}"] for name, n in lines.items()])
    report.numbers = {"totals": lines, "outcomes": [asdict(x) for x in outcomes]}
    report.gate("kills after which nothing was missing", good, at_least=times)
    return report.finish(keep=not quick)


if __name__ == "__main__":
    sys.exit(main())
