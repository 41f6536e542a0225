"""What sets the tags apart: the experts they favour, the loss they have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.text import Text

from moe_lens.lacking import not_there
from moe_lens.numbers import NONE, count, decimal, percent, times
from moe_lens.queries.info import phase_order
from moe_lens.report.answers import Answers, total
from moe_lens.terminal.grid import add_numbers, add_row, notes, table

if TYPE_CHECKING:
    from rich.console import RenderableType

_ENTRY = 23  # columns of one expert in the table
_TAG = 20
_ROOM = 70  # columns from which the extremes over layers fit


def hottest(answers: Answers, width: int) -> list[RenderableType]:
    """The experts that each tag favours, hottest first, as many as fit."""
    if not answers.hottest:
        return [Text("No tag chose an expert often enough (100 times) to tell.")]
    places = max(1, min(max(row["place"] for row in answers.hottest), (width - _TAG) // _ENTRY))
    made = table("tag", *(f"#{place}" for place in range(1, places + 1)))
    for tag in dict.fromkeys(row["tag"] for row in answers.hottest):
        entries = [row for row in answers.hottest if row["tag"] == tag and row["place"] <= places]
        add_row(made, tag, *(_entry(row, answers.hottest_by) for row in entries))
    if answers.hottest_by == "lift":
        note = (
            "L layer, E expert: lift (the tag's share of this expert over everyone's) and, in "
            "brackets, the share of the tag's choices in the layer."
        )
    else:
        note = "L layer, E expert: share of the layer's choices. With one tag there is no lift."
    return [made, notes(note)]


def routing(answers: Answers, width: int) -> list[RenderableType]:
    """How sure the routers are of each tag's tokens, and what share of them found no room."""
    made = table("tag")
    room = width >= _ROOM
    drops_seen = answers.info.knows_drops
    add_numbers(
        made, "router\nentropy", *(["lowest\nin layer", "highest\nin layer"] if room else [])
    )
    add_numbers(made, *(["dropped", "unserved\ntokens"] if drops_seen else []))
    for tag in answers.tags:
        sure = [r for r in answers.confidence_by_tag if r["tag"] == tag]
        sure = [r for r in sure if r["entropy_norm"] is not None]
        drops = [r for r in answers.drops_by_tag if r["tag"] == tag]
        add_row(
            made,
            tag,
            decimal(_over(sum(r["entropy_norm"] for r in sure), len(sure))),
            *([_layer(min(sure, key=_entropy, default=None))] if room else []),
            *([_layer(max(sure, key=_entropy, default=None))] if room else []),
            *([percent(_over(total(drops, "dropped"), total(drops, "routed")))] * drops_seen),
            *(
                [percent(_over(total(drops, "unserved_tokens"), total(drops, "tokens")))]
                * drops_seen
            ),
        )
    note = "router entropy: of its distribution per token, over ln E, mean over layers."
    if drops_seen:
        note += (
            " dropped: share of the tag's choices that no expert computed; unserved: of its "
            "tokens, in the mean layer."
        )
    return [made, notes(note)]


def losses(answers: Answers) -> list[RenderableType]:
    """Mean loss of each tag in each phase, in nats and in bits."""
    if not any(row["loss"] is not None for row in answers.losses):
        how = not_there(answers.info, "losses", otherwise="hand them over with rec.loss(...)")
        return [Text(f"No loss was recorded: {how}.")]
    phases = sorted({row["phase"] for row in answers.losses}, key=phase_order)
    cells = {(row["phase"], row["tag"]): row for row in answers.losses}
    made = table("tag")
    add_numbers(made, "tokens")
    for phase in phases:
        add_numbers(made, f"{phase}\nnats", "\nbits")
    for tag in answers.tags:
        row = [count(total([r for r in answers.losses if r["tag"] == tag], "tokens"))]
        for phase in phases:
            row += _loss(cells.get((phase, tag), {}).get("loss"))
        add_row(made, tag, *row)
    if len(answers.tags) > 1:
        made.add_section()
        row = [count(total(answers.losses, "tokens"))]
        for phase in phases:
            row += _loss(_mean(answers, phase))
        add_row(made, "all", *row, style="bold")
    note = "Mean per token, as given to rec.loss: nats if cross-entropy; bits = nats / ln 2."
    return [made, notes(note)]


def _entry(row: dict[str, float], by: str) -> str:
    where = f"L{row['layer']} E{row['expert']}"
    if by == "share":
        return f"{where} {percent(row['share'])}"
    return f"{where} {times(row['lift'])} ({percent(row['share'])})"


def _entropy(row: dict[str, float]) -> float:
    return row["entropy_norm"]


def _layer(row: dict[str, float] | None) -> str:
    return NONE if row is None else f"{decimal(row['entropy_norm'])} (L{row['layer']})"


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(answers: Answers, phase: str) -> float | None:
    rows = [r for r in answers.losses if r["phase"] == phase and r["loss"] is not None]
    tokens = total(rows, "loss_tokens")
    return sum(r["loss"] * r["loss_tokens"] for r in rows) / tokens if tokens else None


def _loss(nats: float | None) -> list[str]:
    return [NONE, NONE] if nats is None else [decimal(nats, 3), decimal(nats / math.log(2), 3)]
