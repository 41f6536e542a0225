"""A bar of the parts of a measurement, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, nothing elsewhere; yields what feeds it.

    Args:
        title: Stands in front of it.
    """
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    with rich.Progress(
        rich.TextColumn(title),
        rich.BarColumn(bar_width=None),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("loading the model, running it as it is", total=None)

        def on_progress(done: int, of: int, now: str) -> None:
            bar.update(task, completed=done, total=of or None, description=now)

        yield on_progress
