"""`moe-lens recover`: seal what a dead writer left."""

from __future__ import annotations

import typer

from moe_lens.commands.arguments import Run


def recover(run: Run) -> None:
    """Seal what a writer that died left open. Refuses while the writer lives.

    Nothing is lost without it: readers see open streams too. It makes the trace smaller, and
    quicker to read.

    \b
    Example:
      moe-lens recover traces/run1
    """  # noqa: D301  (\b keeps the lines as they are)
    from moe_lens.trace.check import check_place
    from moe_lens.trace.recover import recover as seal

    check_place(run)
    sealed = seal(run)
    for each in sealed:
        typer.echo(f"rank {each.rank}: {each.table}: {each.rows:,} rows sealed")
    if not sealed:
        typer.echo(f"{run}: nothing was left open")
