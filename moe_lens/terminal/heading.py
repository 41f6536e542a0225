"""The facts at the top of the page, and what stands out."""

from __future__ import annotations

from rich.table import Table

from moe_lens.report.answers import Answers
from moe_lens.report.facts import facts
from moe_lens.terminal.grid import add_row


def heading(answers: Answers) -> Table:
    """What was recorded, and one line each on load and drops."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, text in facts(answers).items():
        add_row(grid, label, text)
    return grid
