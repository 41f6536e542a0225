"""Alarms in the terminal: the answer, what fired and where, and what could not be judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from moe_lens.metrics.alarms import ALARMS, FALSE_ALARMS
from moe_lens.terminal.grid import add_row, notes, table
from moe_lens.terminal.plain import print_plain

if TYPE_CHECKING:
    from moe_lens.metrics.alarms import Verdict
    from moe_lens.queries.check import Checked

_MOST = 8
"""Messages of one alarm that are printed; --json has all."""
_EXPLAINED = (
    "Beyond chance and beyond a size. Routing that stays as it is sets off any alarm of any layer "
    f"in at most {FALSE_ALARMS:.0%} of phases; docs/check.md says how that was measured."
)


def print_checked(console: Console, found: list[Checked]) -> None:
    """Print what the alarms say, phase after phase.

    Args:
        console: Where to.
        found: What `moe_lens.queries.check.check` returned.
    """
    for each in found:
        print_plain(console, Text(_answer(each), style="bold"), "")
        made = table("alarm", "state")
        made.add_column("fires")
        for verdict in each.verdicts:
            style = "bold red" if verdict.fired else "dim" if not verdict.judged else ""
            add_row(made, verdict.alarm, _state(verdict), ALARMS[verdict.alarm].fires, style=style)
        print_plain(console, Padding.indent(made, 2))
        for verdict in each.verdicts:
            _print_fired(console, verdict)
        _print_lacking(console, each)
        print_plain(console, "")
    print_plain(console, notes(_EXPLAINED), "")


def _answer(each: Checked) -> str:
    names = [v.alarm for v in each.verdicts if v.fired]
    judged = sum(bool(v.judged) for v in each.verdicts)
    if names:
        return f"{each.phase}: {', '.join(names)} fired."
    if not judged:
        return f"{each.phase}: nothing could be judged."
    return f"{each.phase}: quiet; {judged} of {len(each.verdicts)} alarms could be judged."


def _state(verdict: Verdict) -> str:
    if verdict.fired:
        return f"fired ({len(verdict.fired)})"
    return "quiet" if verdict.judged else "not judged"


def _print_fired(console: Console, verdict: Verdict) -> None:
    if not verdict.fired:
        return
    print_plain(console, "", Text(verdict.alarm, style="bold"))
    lines = [fired.message + "." for fired in verdict.fired[:_MOST]]
    if len(verdict.fired) > _MOST:
        lines.append(f"… and {len(verdict.fired) - _MOST} more: --json has all.")
    for line in lines:
        print_plain(console, Padding.indent(Text(line), 2))


def _print_lacking(console: Console, each: Checked) -> None:
    reasons: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for verdict in each.verdicts:
        for why, layers in verdict.lacks.items():
            reasons.setdefault((why, layers), []).append(verdict.alarm)
    if not reasons:
        return
    print_plain(console, "", Text("not judged", style="bold"))
    every = max(len(v.judged) + sum(map(len, v.lacks.values())) for v in each.verdicts)
    for (why, layers), names in reasons.items():
        where = "" if len(layers) == every else f" (layers {', '.join(map(str, layers))})"
        print_plain(console, Padding.indent(Text(f"{', '.join(names)}{where}: {why}."), 2))
