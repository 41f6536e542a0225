"""What stands around a measurement on a model of the user's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moe_lens.commands.parts_bar import progress_bar
from moe_lens.commands.user_code import said_by

if TYPE_CHECKING:
    from moe_lens.trace.schema import Table


@contextmanager
def measuring(
    run: Path, table: Table, name: str, model: str, data: str
) -> Iterator[Callable[[int, int, str], None]]:
    """Inside, the model is loaded and measured; yields what feeds a bar.

    The run is looked at first: a model may take minutes to load. Ctrl-C that ends it before there
    is a result is said, and ends the process with 130.

    Args:
        run: The trace.
        table: Of the result.
        name: Of the result.
        model: What `--model` was given.
        data: What `--data` was given.

    Raises:
        TraceError: The run is no trace, or the result's name no name.
        CommandError: Code of the user's raised.
    """
    from moe_lens.trace.measured import result_path
    from moe_lens.trace.reader import open_run

    open_run(run)
    result_path(run, table, name)
    # Read when torch is loaded: its threads, spinning while they wait for each other, cost several
    # times the work where anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        # The bar first: importing torch takes seconds.
        with progress_bar(table.name) as on_progress, said_by(f"--data {data} in --model {model}"):
            yield on_progress
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was measured.", err=True)
        raise typer.Exit(130) from None
