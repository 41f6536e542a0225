"""The look of every table on the page, and how one that is too wide for it is cut in two."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

NARROW = 96
"""Below so many columns the widest table leaves out what can be spared."""


class Grid(Table):
    """A table none of whose numbers is ever cut.

    Where it is too wide for the page its columns stand closer; where that is not enough, what does
    not fit follows in tables below, with the columns of text again. Columns that were added
    together stay together if the page has room for them. Text is folded, not cut.
    """

    def __init__(self, *left: str) -> None:
        super().__init__()
        self.together: list[int] = []
        """The first column of each call of `add_numbers`."""
        for name in left:
            self.add_column(name, vertical="bottom", overflow="fold")
        self.left = len(left)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide, close = (self._parts(options.max_width, gap) for gap in (2, 1))
        gap, parts = (1, close) if len(close) < len(wide) else (2, wide)
        for place, columns in enumerate(parts):
            if place:
                yield Text("")
            yield self._part(columns, gap)

    def _parts(self, room: int, gap: int) -> list[list[int]]:
        """The columns of each table, with so many blanks between two of them."""
        names = list(range(self.left))
        widths = [_width(x, place < self.left) + gap for place, x in enumerate(self.columns)]
        room += gap - min(sum(widths[: self.left]), room // 2)
        parts: list[list[int]] = []
        free = 0
        for block in self._blocks():
            needed = sum(widths[column] for column in block)
            for piece in [block] if needed <= room else [[column] for column in block]:
                needed = sum(widths[column] for column in piece)
                if not parts or needed > free:
                    parts.append(list(names))
                    free = room
                parts[-1] += piece
                free -= needed
        return parts or [names]

    def _blocks(self) -> Iterator[list[int]]:
        """Columns beside those of text, as they were added."""
        starts = sorted({self.left, *self.together})
        for first, end in zip(starts, [*starts[1:], len(self.columns)], strict=True):
            if first < end:
                yield list(range(first, end))

    def _part(self, columns: list[int], gap: int) -> Table:
        made = Table(
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, gap - 1, 0, 0),
            header_style="bold cyan",
        )
        chosen = [self.columns[column] for column in columns]
        for each in chosen:
            made.add_column(
                each.header, justify=each.justify, vertical=each.vertical, overflow=each.overflow,
                no_wrap=each.no_wrap,
            )  # fmt: skip
        cells = zip(*(each.cells for each in chosen), strict=True)
        for row, texts in zip(self.rows, cells, strict=True):
            made.add_row(*texts, style=row.style, end_section=row.end_section)
        return made


def _width(column: Column, whole: bool) -> int:
    """Of the longest line; of text that may be folded, unless asked for whole, the longest word."""
    end = "\n" if whole or column.no_wrap else None
    texts = (str(text) for text in (column.header, *column.cells))
    return max((cell_len(part) for text in texts for part in text.split(end)), default=0)


def table(*left: str) -> Grid:
    """An empty table whose first columns hold text; numbers come by `add_numbers`."""
    return Grid(*left)


def add_numbers(made: Grid, *names: str) -> None:
    """Add columns of numbers, which stay together where a table is cut in two."""
    made.together.append(len(made.columns))
    for name in names:
        made.add_column(name, justify="right", no_wrap=True, vertical="bottom")


def add_row(made: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row. Text is taken as it is: a tag named [red] is no markup."""
    made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def notes(*texts: str) -> Text:
    """What a reader needs to understand the table above."""
    return Text("\n" + " ".join(texts), style="dim")
