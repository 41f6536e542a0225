"""Whether the recording can be trusted: what was seen, what was lost, what went wrong."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from moe_lens.report.answers import Answers
from moe_lens.report.facts import checks


def health(answers: Answers) -> Table:
    """One line a check: a mark, and what it found."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for fine, text in checks(answers):
        mark = Text("✓", style="bold green") if fine else Text("!", style="bold red")
        grid.add_row(mark, Text(text))
    return grid
