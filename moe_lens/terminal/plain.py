"""Printing pages: on a terminal as rich does it, in a pipe without blanks at line ends."""

from __future__ import annotations

from rich.console import Console, RenderableType


def print_plain(console: Console, *parts: RenderableType, whole: bool = False) -> None:
    """Print without the blanks with which rich fills lines: a piped page has none at line ends.

    Args:
        console: Where to.
        parts: What.
        whole: A line that is wider than the console stays one: it is there to be copied.
    """
    for part in parts:
        if console.is_terminal:
            console.print(part, soft_wrap=whole)
        else:
            with console.capture() as captured:
                console.print(part, soft_wrap=whole)
            lines = (line.rstrip() for line in captured.get().splitlines())
            console.file.write("".join(f"{line}\n" for line in lines))
