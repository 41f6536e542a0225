"""Arguments that several subcommands take, said once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moe_lens.errors import CommandError

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
Layers = Annotated[str | None, typer.Option(help="Only these, as 0-3,7.", metavar="LAYERS")]
Steps = Annotated[str | None, typer.Option(help="Only these, as 100-199.", metavar="STEPS")]


def numbers(text: str, option: str) -> list[int]:
    """`0-3,7` as numbers.

    Raises:
        CommandError: It is not so written.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise CommandError(f"{option} takes numbers as 0-3,7; got {text!r}.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def range_of(text: str) -> range:
    """`100-199` as a range of steps.

    Raises:
        CommandError: It is not so written.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise CommandError(f"--steps takes one step or a range, as 100-199; got {text!r}.")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
