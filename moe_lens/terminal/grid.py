"""The look of every table on the page."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

NARROW = 96
"""Below so many columns the widest table stands close and leaves out what can be spared."""


def table(*left: str, tight: bool = False) -> Table:
    """An empty table whose first columns hold text; numbers come by `add_numbers`."""
    made = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0 if tight else 1, 0, 0),
        header_style="bold cyan",
    )
    for name in left:
        made.add_column(name, no_wrap=True, vertical="bottom")
    return made


def add_numbers(made: Table, *names: str) -> None:
    """Add columns of numbers."""
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)


def add_row(made: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row. Text is taken as it is: a tag named [red] is no markup."""
    made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def notes(*texts: str) -> Text:
    """What a reader needs to understand the table above."""
    return Text("\n" + " ".join(texts), style="dim")
