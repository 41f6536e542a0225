"""A line under numbers of forwards that no engine ran."""

from __future__ import annotations

from rich.console import Console

from moe_lens.lacking import made_up
from moe_lens.terminal.grid import notes
from moe_lens.terminal.plain import print_plain


def print_made_up(console: Console, steps: str) -> None:
    """Print it; nothing where forwards were run.

    Args:
        console: Where to.
        steps: How they were made, as the trace says.
    """
    if steps:
        print_plain(console, notes(made_up(steps)), "")
