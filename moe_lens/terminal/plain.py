"""Printing pages: on a terminal as rich does it, in a pipe without blanks at line ends."""

from __future__ import annotations

from rich.console import Console, RenderableType


def print_plain(console: Console, *parts: RenderableType) -> None:
    """Print without the blanks with which rich fills lines: a piped page has none at line ends."""
    for part in parts:
        if console.is_terminal:
            console.print(part)
        else:
            with console.capture() as captured:
                console.print(part)
            lines = (line.rstrip() for line in captured.get().splitlines())
            console.file.write("".join(f"{line}\n" for line in lines))
