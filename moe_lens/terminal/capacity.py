"""What did not fit: overflow, drops and unserved tokens, phase by phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from moe_lens.lacking import not_there
from moe_lens.numbers import count, percent
from moe_lens.report.answers import Answers, Rows, total
from moe_lens.terminal.grid import add_numbers, add_row, notes, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def capacity(answers: Answers) -> list[RenderableType]:
    """A table of the phases in which something overflowed; the others in words."""
    if not answers.info.knows_drops:
        return [Text(f"What was dropped is not known: {not_there(answers.info, 'drops')}.")]
    lossy = {p: rows for p, rows in answers.drops.items() if _lost(rows)}
    parts: list[RenderableType] = []
    if lossy:
        parts.append(_table(lossy))
    for phase, rows in answers.drops.items():
        if phase not in lossy:
            gap = "\n" if parts else ""
            parts.append(
                Text(
                    f"{gap}{phase}: every one of {count(total(rows, 'routed'))} choices was "
                    "computed; nothing overflowed, no token went unserved."
                )
            )
    if lossy:
        parts.append(
            notes(
                "overflow, dropped: share of choices that found the expert full, and that no "
                "expert then computed. unserved: tokens for which no expert ran at all."
            )
        )
    return parts or [Text("No choices were recorded.")]


def _lost(rows: Rows) -> int:
    return total(rows, "overflowed") + total(rows, "dropped") + total(rows, "unserved_tokens")


def _table(lossy: dict[str, Rows]) -> Table:
    made = table("layer")
    for phase in lossy:
        add_numbers(made, f"{phase}\noverflow", "\ndropped", "unserved\ntokens")
    by_layer = {phase: {row["layer"]: row for row in rows} for phase, rows in lossy.items()}
    for layer in sorted({layer for rows in by_layer.values() for layer in rows}):
        cells: list[str] = []
        for rows in by_layer.values():
            row = rows.get(layer)
            cells += ["", "", ""] if row is None else _cells([row])
        add_row(made, str(layer), *cells)
    made.add_section()
    add_row(made, "all", *(c for rows in lossy.values() for c in _cells(rows)), style="bold")
    return made


def _cells(rows: Rows) -> list[str]:
    routed, tokens = total(rows, "routed"), total(rows, "tokens")
    unserved = total(rows, "unserved_tokens")
    share = percent(unserved / tokens) if tokens else ""
    return [
        percent(total(rows, "overflowed") / routed) if routed else "",
        percent(total(rows, "dropped") / routed) if routed else "",
        f"{count(unserved)} ({share})" if unserved else "0",
    ]
