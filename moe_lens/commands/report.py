"""`moe-lens report`: a page about a run, in the terminal or as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_lens.commands.arguments import Phase, Runs, SkipDamaged
from moe_lens.commands.interrupt import ends_at_once


def report(
    run: Runs,
    phase: Phase = None,
    width: Annotated[
        int | None, typer.Option(help="Columns; default: the terminal's, or 100 in a pipe.", min=40)
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also save the page as a picture.", metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one HTML file with figures instead; it opens offline.", metavar="FILE"
        ),
    ] = None,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Where the tokens went: load, drops, router entropy, dead experts, loss by tag.

    \b
    Examples:
      moe-lens report traces/run1
      moe-lens report traces/run1 --phase eval
      moe-lens report traces/run1 --width 120 > report.txt
      moe-lens report traces/run1 --width 120 --svg report.svg
      moe-lens report traces/run1 --html report.html
    """  # noqa: D301  (\b keeps the lines as they are)
    import sys

    from rich.console import Console

    from moe_lens.errors import CommandError
    from moe_lens.queries.info import size
    from moe_lens.queries.session import open_trace
    from moe_lens.terminal.page import render
    from moe_lens.terminal.picture import save_picture

    if width is None and not sys.stdout.isatty():
        width = 100
    with ends_at_once(), open_trace(run, skip_damaged=skip_damaged) as trace:
        phases = {p for each in trace.info().runs for p in each.phases}
        if phase is not None and phase not in phases:
            there = ", ".join(sorted(phases)) or "none yet"
            raise CommandError(f"No forward was of phase {phase!r}. Phases of this trace: {there}.")
        if html is None:
            render(trace, Console(width=width, highlight=False), phase)
        else:
            from moe_lens.report.page import save_page

            save_page(trace, html, phase)
            typer.echo(f"Wrote {html} ({size(html.stat().st_size)}).")
        if svg is not None:
            save_picture(trace, svg, width or 100, phase)
