"""The numbers at the top of the overview, from the rows of stored questions. No Streamlit here."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lens_dashboards.findings import Answers, Rows, known, total


@dataclass(frozen=True)
class Tiles:
    """Health at a glance; None: not recorded, or nothing there."""

    tokens: int
    """Valid tokens, each once."""
    overflow_rate: float | None
    """Choices that found their expert full, over the router's choices, of all layers."""
    dropped_rate: float | None
    """Choices that no expert computed, over the router's choices, of all layers."""
    entropy_norm: float | None
    """Router entropy over its maximum: mean over layers and tokens."""
    worst_layer: int | None
    """Layer whose hottest expert has the most over the mean."""
    max_over_mean: float | None
    floor: float | None
    """What chance alone gives that layer."""
    all_to_all_ms: float | None
    """Dispatch and combine of one layer in one forward, mean."""
    lost_rows: int
    breaches: int


def tiles(answers: Answers, all_to_all: Rows) -> Tiles:
    """The numbers.

    Args:
        answers: As the rules take them.
        all_to_all: Rows of the stored question of this name.
    """
    balance = [r for r in answers.layer_balance if known(r["max_over_mean"]) is not None]
    worst = max(balance, key=lambda r: r["max_over_mean"], default=None)
    return Tiles(
        tokens=total(answers.quality_by_tag, "tokens"),
        overflow_rate=_of_choices(answers.dropped_tokens, "overflowed"),
        dropped_rate=_of_choices(answers.dropped_tokens, "dropped"),
        entropy_norm=_mean(answers.router_confidence, "entropy_norm", "tokens"),
        worst_layer=None if worst is None else int(worst["layer"]),
        max_over_mean=None if worst is None else float(worst["max_over_mean"]),
        floor=None if worst is None else known(worst["max_over_mean_floor"]),
        all_to_all_ms=_all_to_all(all_to_all),
        lost_rows=total(answers.capture_health, "lost_rows"),
        breaches=total(answers.capture_health, "breaches"),
    )


def _of_choices(rows: Rows, column: str) -> float | None:
    """Share of the router's choices; None: nothing was routed, or nothing tells."""
    routed = total(rows, "routed")
    if not routed or all(known(r[column]) is None for r in rows):
        return None
    return total(rows, column) / routed


def _all_to_all(rows: Rows) -> float | None:
    means = [_mean(rows, column, "forwards") for column in ("dispatch_ms", "combine_ms")]
    seen = [m for m in means if m is not None]
    return sum(seen) if seen else None


def _mean(rows: Rows, column: str, weight: str) -> float | None:
    rated = [r for r in rows if known(r[column]) is not None]
    weights = sum(r[weight] for r in rated)
    return sum(r[column] * r[weight] for r in rated) / weights if weights else None
