"""The facts at the top of the page, and what stands out."""

from __future__ import annotations

from rich.table import Table

from moe_lens.queries.info import size
from moe_lens.terminal.answers import Answers, total
from moe_lens.terminal.grid import add_row
from moe_lens.terminal.numbers import count, percent, times


def heading(answers: Answers) -> Table:
    """What was recorded, and one line each on load and drops."""
    info = answers.info
    steps = f"{count(info.steps)} steps, {count(info.forwards)} forwards"
    if info.first_step is not None:
        steps += f" (steps {count(info.first_step)} to {count(info.last_step)})"
    facts = {
        "model": info.model or "unnamed",
        "routers": info.shape,
        "recorded": steps,
        "phases": ", ".join(_phases(answers)),
        "tokens": f"{count(total(answers.health, 'tokens'))} valid, "
        f"{count(total(answers.health, 'padding_tokens'))} padding; "
        f"{count(info.token_rows)} kept one by one ({info.sampling})",
        "disk": size(sum(info.bytes.values())),
        "state": info.state,
        "load": _load(answers),
        "drops": _drops(answers),
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, text in facts.items():
        if text:
            add_row(grid, label, text)
    return grid


def _phases(answers: Answers) -> list[str]:
    order = {phase: i for i, phase in enumerate(answers.phases)}
    rows = sorted(answers.health, key=lambda row: order.get(row["phase"], len(order)))
    return [f"{row['phase']} ({count(row['forwards'])} forwards)" for row in rows]


def _load(answers: Answers) -> str:
    chosen = [row for row in answers.load if row["ratio"]]
    if not chosen:
        return ""
    hottest = max(chosen, key=lambda row: row["ratio"])
    text = (
        f"hottest expert {times(hottest['ratio'])} the mean "
        f"(layer {hottest['layer']}, expert {hottest['expert']})"
    )
    judged = [row for row in answers.balance if row["dead_experts"] is not None]
    if judged:
        experts = count(total(judged, "experts"))
        text += f"; of {experts} experts {count(total(judged, 'dead_experts'))} dead, "
        text += f"{count(total(judged, 'dormant_experts'))} below 10 % of their share"
    return text


def _drops(answers: Answers) -> str:
    parts = []
    for phase, rows in answers.drops.items():
        routed = total(rows, "routed")
        if routed:
            parts.append(f"{phase} {percent(total(rows, 'dropped') / routed)}")
    return "" if not parts else "dropped choices: " + ", ".join(parts)
