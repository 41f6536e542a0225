"""`moe-lens info`: what a trace holds."""

from __future__ import annotations

import typer

from moe_lens.commands.arguments import Runs, SkipDamaged
from moe_lens.commands.interrupt import ends_at_once


def info(run: Runs, skip_damaged: SkipDamaged = False) -> None:
    """What a trace holds: model, routers, steps, tokens, bytes, and what went wrong.

    \b
    Example:
      moe-lens info traces/run1
    """  # noqa: D301  (\b keeps the lines as they are)
    from moe_lens.queries.session import open_trace

    with ends_at_once(), open_trace(run, skip_damaged=skip_damaged) as trace:
        typer.echo(repr(trace.info()))
