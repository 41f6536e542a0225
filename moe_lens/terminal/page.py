"""The whole page: what `moe-lens report` prints, and the demo at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moe_lens.report.answers import Answers, gather
from moe_lens.terminal.capacity import capacity
from moe_lens.terminal.heading import heading
from moe_lens.terminal.health import health
from moe_lens.terminal.heatmap import HeatMap
from moe_lens.terminal.layers import balance
from moe_lens.terminal.plain import print_plain
from moe_lens.terminal.replays import replays
from moe_lens.terminal.tags import hottest, losses, routing

if TYPE_CHECKING:
    from moe_lens.queries.session import Trace

_INDENT = 2
_SIDE_BY_SIDE = 160
"""From so many columns on, tables stand in two columns."""


def render(trace: Trace, console: Console, phase: str | None = None) -> None:
    """Print a page for each run of the trace.

    Args:
        trace: An open trace.
        console: Where to; its width and colours decide how things are drawn.
        phase: Count this phase only (train, eval, prefill, decode).
    """
    for answers in gather(trace, phase):
        _run(answers, console)


def _run(answers: Answers, console: Console) -> None:
    width = console.width - _INDENT
    half = width // 2 - 2
    where = f"phase {answers.phase}" if answers.phase else "all phases"
    print_plain(console, Rule(Text(f"moe_lens · {answers.info.run}", style="bold"), align="left"))
    print_plain(console, Padding.indent(heading(answers), _INDENT))
    if not answers.balance:
        print_plain(console, _section("Load", Text("No MoE layer is known yet.")))
    elif width < _SIDE_BY_SIDE:
        print_plain(
            console,
            _section(f"Choices by layer and expert ({where})", _load(answers)),
            _section(f"Routers and balance by layer ({where})", balance(answers, width)),
            _section("Capacity", *capacity(answers)),
            _section("Hottest experts by tag", *hottest(answers, width)),
            _section("Routing by tag", *routing(answers, width)),
            _section("Loss by tag", *losses(answers)),
        )
    else:
        print_plain(
            console,
            _section(f"Choices by layer and expert ({where})", _load(answers)),
            _beside(
                _section(f"Routers and balance by layer ({where})", balance(answers, half)),
                _section("Capacity", *capacity(answers)),
                half,
            ),
            _section("Hottest experts by tag", *hottest(answers, half)),
            _beside(
                _section("Routing by tag", *routing(answers, half)),
                _section("Loss by tag", *losses(answers)),
                half,
            ),
        )
    if measured := replays(answers):
        print_plain(console, _section("Replay", *measured))
    print_plain(console, _section("Capture", health(answers)))


def _load(answers: Answers) -> RenderableType:
    if not any(row["routed"] for row in answers.load):
        return Text("No valid token was routed.")
    return HeatMap(answers.load)


def _section(title: str, *parts: RenderableType) -> RenderableType:
    return Group("", Text(title, style="bold"), *(Padding.indent(p, _INDENT) for p in parts))


def _beside(left: RenderableType, right: RenderableType, half: int) -> Table:
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_column(width=half)
    grid.add_column(width=half)
    grid.add_row(left, right)
    return grid
