"""`moe-lens diff`: where two runs of the same tokens route differently."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_lens.commands.arguments import Phase, SkipDamaged
from moe_lens.commands.interrupt import ends_at_once


class By(StrEnum):
    """How tokens are aligned."""

    token = "token"
    position = "position"


def diff(
    a: Annotated[Path, typer.Argument(help="Folder of a trace.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Folder of another of the same tokens.", metavar="B")],
    by: Annotated[
        By, typer.Option(help="Align by step, forward and token, or by sequence and position.")
    ] = By.token,
    phase: Phase = None,
    flips: Annotated[
        int, typer.Option(help="How many of the first differing decisions to list.", min=0)
    ] = 5,
    match_experts: Annotated[
        bool,
        typer.Option(
            "--match-experts",
            help="Also match experts by the tokens they serve, for runs of other seeds.",
        ),
    ] = False,
    width: Annotated[
        int | None, typer.Option(help="Columns; default: the terminal's, or 100 in a pipe.", min=40)
    ] = None,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Compare two runs of the same tokens: two engines, precisions or checkpoints.

    \b
    Examples:
      moe-lens diff traces/fp32 traces/bf16
      moe-lens diff traces/rollout traces/trainer --by position
      moe-lens diff traces/seed0 traces/seed1 --match-experts
    """  # noqa: D301  (\b keeps the lines as they are)
    import sys

    from rich.console import Console

    from moe_lens.queries.diff import diff as compare
    from moe_lens.terminal.difference import render

    if width is None and not sys.stdout.isatty():
        width = 100
    with ends_at_once():
        found = compare(
            a, b, by=by.value, phase=phase, flips=flips, match_experts=match_experts,
            skip_damaged=skip_damaged,
        )  # fmt: skip
        render(found, Console(width=width, highlight=False))
