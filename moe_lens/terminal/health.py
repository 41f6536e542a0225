"""Whether the recording can be trusted: what was seen, what was lost, what went wrong."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from moe_lens.terminal.answers import Answers, total
from moe_lens.terminal.numbers import count


def health(answers: Answers) -> Table:
    """One line a check: a mark, and what it found."""
    info, rows = answers.info, answers.health
    forwards = count(total(rows, "forwards"))
    breaches = total(rows, "breaches")
    expected, seen = total(rows, "fires_expected"), total(rows, "fires_seen")
    lost = total(rows, "lost_rows")
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()

    def line(fine: bool, text: str) -> None:
        mark = Text("✓", style="bold green") if fine else Text("!", style="bold red")
        grid.add_row(mark, Text(text))

    line(
        breaches == 0,
        f"invariants hold in all of {forwards} forwards"
        if breaches == 0
        else f"{count(breaches)} breaches of an invariant in {forwards} forwards",
    )
    line(
        expected == seen,
        f"routing seen in {count(seen)} of {count(expected)} MoE blocks entered",
    )
    line(lost == 0, f"{count(lost)} per-token rows lost")
    for path in info.never_entered:
        line(False, f"{path} was hooked and never ran")
    if info.missing_ranks:
        line(False, f"ranks missing: {', '.join(map(str, info.missing_ranks))}; counts lack them")
    for text, n in info.warnings.items():
        line(False, f"{text} ({count(n)}×)")
    for path, why in info.damaged.items():
        line(False, f"{path} left out: {why}")
    for name, n in info.pruned.items():
        line(True, f"{count(n)} rows of {name} removed to keep within max_bytes")
    if info.error:
        line(False, f"the recording ended with {info.error}")
    return grid
