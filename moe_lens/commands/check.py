"""`moe-lens check`: alarms over a run's routing, for people and for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.commands.arguments import Layers, Phase, Run, SkipDamaged, numbers
from moe_lens.commands.interrupt import ends_at_once
from moe_lens.errors import CommandError, QueryError
from moe_lens.numbers import finite

if TYPE_CHECKING:
    from moe_lens.queries.check import Checked


def check(
    run: Run,
    only: Annotated[
        str | None, typer.Option(help="Only these alarms, as dead,drift.", metavar="ALARM,...")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Look for changes between this run and RUN, not inside RUN.", metavar="OTHER_RUN"
        ),
    ] = None,
    phase: Phase = None,
    layers: Layers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a page.")] = False,
    skip_damaged: SkipDamaged = False,
) -> None:
    """Alarms: dead and hot experts, imbalance, drift, growing z-loss, collapse, drops.

    Each fires beyond chance and beyond a stated size; routing that stays as it is sets off any of
    them in at most 1 % of phases. What could not be judged is said. docs/check.md has the rules.

    Exit code: 0 quiet, 1 an alarm fired (or the trace cannot be read: then with an error and no
    page), 2 wrong usage.

    \b
    Examples:
      moe-lens check traces/run1
      moe-lens check traces/run1 --only dead,z_loss --phase train --json
      moe-lens check traces/today --against traces/yesterday
    """  # noqa: D301  (\b keeps the lines as they are)
    chosen = None if layers is None else frozenset(numbers(layers, "--layers"))
    names = None if only is None else [name.strip() for name in only.split(",")]

    from contextlib import ExitStack

    from moe_lens.queries.check import check as look
    from moe_lens.queries.session import open_trace

    with ends_at_once(), ExitStack() as opened:
        traces = [
            opened.enter_context(open_trace(path, skip_damaged=skip_damaged))
            for path in (run, against)
            if path is not None
        ]
        try:
            found = look(
                traces[0], phase=phase, layers=chosen, only=names,
                against=None if against is None else traces[1],
            )  # fmt: skip
        except QueryError as e:  # 1 would say that an alarm fired
            raise CommandError(str(e)) from e
        made_steps = next((x.made_steps for t in traces for x in t.info().runs if x.made_steps), "")
    if as_json:
        typer.echo(json.dumps(finite(_said(found, made_steps)), ensure_ascii=False, indent=1))
    else:
        from rich.console import Console

        from moe_lens.terminal.checked import print_checked
        from moe_lens.terminal.made_up import print_made_up

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 100
        print_checked(console, found)
        print_made_up(console, made_steps)
    if any(each.fired for each in found):
        raise typer.Exit(1)


def _said(found: list[Checked], made_steps: str) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [
        {
            "phase": each.phase,
            "made_up_steps": made_steps or None,
            "blocks": each.blocks,
            "fired": each.fired,
            "alarms": [
                {
                    "alarm": v.alarm,
                    "fired": [asdict(f) for f in v.fired],
                    "judged": list(v.judged),
                    "not_judged": [
                        {"why": why, "layers": list(layers)} for why, layers in v.lacks.items()
                    ],
                }
                for v in each.verdicts
            ],
        }
        for each in found
    ]
