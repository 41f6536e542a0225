"""Arguments that several subcommands take, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="Folder of a trace.", metavar="RUN")]
Runs = Annotated[
    list[Path], typer.Argument(help="Folders of one or several traces.", metavar="RUN...")
]
SkipDamaged = Annotated[
    bool, typer.Option("--skip-damaged", help="Leave out segments that cannot be read.")
]
Phase = Annotated[
    str | None, typer.Option(help="Only this phase: train, eval, prefill, decode, ….")
]
