"""A row a layer: how sure its router is, and how evenly it loads its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from moe_lens.lacking import not_there
from moe_lens.numbers import NONE, count, decimal
from moe_lens.terminal.grid import NARROW, add_numbers, add_row, notes, table

if TYPE_CHECKING:
    from moe_lens.report.answers import Answers


_ROOM = 70
"""Columns from which the effective number of experts fits."""


def balance(answers: Answers, width: int) -> RenderableType:
    """The table, and what its columns mean."""
    wide, room = width >= NARROW, width >= _ROOM
    confidence = {row["layer"]: row for row in answers.confidence}
    made = table("layer")
    add_numbers(made, "tokens", "router\nentropy", *(["top-1\nprob"] if wide else []))
    add_numbers(made, "load\nentropy", *(["effective\nexperts"] if room else []))
    add_numbers(made, "max/\nmean", "by\nchance", "dead", "dormant")
    for row in answers.balance:
        sure = confidence.get(row["layer"], {})
        add_row(
            made,
            f"{row['layer']}",
            count(row["tokens"]),
            decimal(sure.get("entropy_norm")),
            *([decimal(sure.get("top1_prob"))] if wide else []),
            decimal(row["load_entropy_norm"], 3),
            *([_of(row["effective_experts"], row["experts"])] if room else []),
            decimal(row["max_over_mean"]),
            decimal(row["max_over_mean_floor"]),
            _alarm(row["dead_experts"]),
            _alarm(row["dormant_experts"]),
        )
    return Group(made, notes(*_explained(answers)))


def _explained(answers: Answers) -> list[str]:
    texts = [
        "Entropies run from 0 to 1 (over ln E): router, of its distribution per token; load, of "
        "the tokens over experts. by chance: the max/mean that a router without favourites would "
        "show. dormant: below 10 % of the fair share, dead ones among them."
    ]
    if all(row.get("entropy") is None for row in answers.confidence):
        why = not_there(
            answers.info, "entropy", otherwise="these routers have no distribution to show"
        )
        texts.append(f"No router entropy was recorded: {why}.")
    few = [row for row in answers.balance if row["dead_experts"] is None and row["tokens"]]
    if few:
        needed = max(row["tokens_needed"] or 0 for row in few)
        texts.append(
            f"{NONE} under dead: too few tokens to tell a dead expert from chance; it takes "
            f"{count(needed)}."
        )
    return texts


def _of(value: float | None, whole: int) -> str:
    return NONE if value is None else f"{value:.1f}/{whole}"


def _alarm(experts: int | None) -> Text:
    if experts is None:
        return Text(NONE, style="dim")
    return Text(count(experts), style="bold yellow" if experts else "")
