"""What to look at first: rules over the answers of stored questions. No Streamlit here.

Each rule takes rows (plain dicts) and gives sentences with the numbers that made it speak. What
chance alone would do is never a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_lens.numbers import count, decimal, percent, times
from moe_lens.queries.info import RunInfo

Rows = Sequence[Mapping[str, Any]]

DATA, MODEL, NOTE = 0, 1, 2
"""How serious: the trace is not whole; the model is in trouble; worth a look."""

DROPPED = 0.01
"""Share of a layer's choices that are dropped, from which on it is a finding."""
UNSERVED = 0.001
"""Share of a layer's tokens that no expert served, from which on it is a finding."""
IMBALANCE = 2.0
"""How far above its chance floor a layer's hottest expert must be, both less 1 (the even load)."""
CERTAIN, UNDECIDED = 0.05, 0.98
"""Router entropy over its maximum, below or above which it is a finding."""
WORSE = 1.1
"""A tag's loss over the mean loss, from which on it is a finding."""


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    kind: int
    size: float
    """How bad, among findings of its kind."""
    sentence: str
    page: str
    """Name of the page that shows more."""
    link: dict[str, Any] = field(default_factory=dict)
    """Filters that narrow the page to it."""


@dataclass(frozen=True)
class Answers:
    """What the rules look at: rows of the stored questions of these names, of one run."""

    layer_balance: Rows
    dropped_tokens: Rows
    """With `by_tag` off."""
    router_confidence: Rows
    """With `by_tag` off."""
    dead_experts: Rows
    quality_by_tag: Rows
    capture_health: Rows


def look_first(info: RunInfo, answers: Answers) -> list[Finding]:
    """All findings, the most serious first; empty: nothing stands out."""
    found: list[Finding] = [*_files(info), *_capture(answers.capture_health)]
    by_rows: tuple[tuple[Callable[[Rows], Iterable[Finding]], Rows], ...] = (
        (_dead, answers.dead_experts),
        (_dropped, answers.dropped_tokens),
        (_unserved, answers.dropped_tokens),
        (_imbalance, answers.layer_balance),
        (_routers, answers.router_confidence),
        (_tags, answers.quality_by_tag),
    )
    for rule, rows in by_rows:
        found += rule(rows)
    return sorted(found, key=lambda f: (f.kind, -f.size))


def _files(info: RunInfo) -> Iterable[Finding]:
    if info.missing_ranks:
        ranks = ", ".join(map(str, info.missing_ranks))
        yield Finding(DATA, 4, f"Ranks {ranks} are missing: their tokens are in no number.", "live")
    if info.damaged:
        text = f"{count(len(info.damaged))} segments cannot be read and were left out."
        yield Finding(DATA, 3, text, "live")
    if info.error:
        yield Finding(DATA, 2, f"The recording ended with an error: {info.error}.", "live")


def _capture(rows: Rows) -> Iterable[Finding]:
    breaches, lost = total(rows, "breaches"), total(rows, "lost_rows")
    unseen = total(rows, "fires_expected") - total(rows, "fires_seen")
    if breaches:
        text = f"{count(breaches)} invariants of the capture failed: counts may be wrong there."
        yield Finding(DATA, 10, text, "live")
    if unseen > 0:
        text = f"The routing of {count(unseen)} MoE blocks that ran was not seen."
        yield Finding(DATA, 9, text, "live")
    if lost:
        text = (
            f"{count(lost)} rows of single tokens were lost, since the writer fell behind. "
            "Counts are whole; what is made of single tokens is not."
        )
        yield Finding(DATA, 1, text, "live")


def _dead(rows: Rows) -> Iterable[Finding]:
    dead = [r for r in rows if r["state"] == "dead"]
    if not dead:
        return
    layers: dict[int, int] = {}
    for row in dead:
        layers[row["layer"]] = layers.get(row["layer"], 0) + 1
    worst = max(layers, key=lambda layer: layers[layer])
    many = len(dead) != 1
    text = f"{count(len(dead))} expert{'s are' if many else ' is'} dead: no token chose "
    text += "them" if many else f"it (layer {worst}, expert {dead[0]['expert']})"
    if many:
        text += f", {layers[worst]} of them in layer {worst}"
    yield Finding(MODEL, 5, f"{text}.", "experts", _layer(worst))


def _dropped(rows: Rows) -> Iterable[Finding]:
    above = [r for r in rows if (known(r["dropped_rate"]) or 0) >= DROPPED]
    if above:
        worst = max(above, key=lambda r: r["dropped_rate"])
        rate = worst["dropped_rate"]
        text = f"Layer {worst['layer']} drops {percent(rate)} of its choices"
        if len(above) > 1:
            text += f", the most of {len(above)} layers that drop {percent(DROPPED)} or more"
        yield Finding(MODEL, 3 + rate, f"{text}.", "capacity", _layer(worst["layer"]))


def _unserved(rows: Rows) -> Iterable[Finding]:
    above = [r for r in rows if (known(r["unserved_rate"]) or 0) >= UNSERVED]
    if above:
        worst = max(above, key=lambda r: r["unserved_rate"])
        rate, layer = worst["unserved_rate"], worst["layer"]
        text = f"No expert served {percent(rate)} of the tokens in layer {layer}."
        yield Finding(MODEL, 2 + rate, text, "capacity", _layer(layer))


def _imbalance(rows: Rows) -> Iterable[Finding]:
    def excess(row: Mapping[str, Any]) -> float:
        hottest, floor = known(row["max_over_mean"]), known(row["max_over_mean_floor"])
        if hottest is None or floor is None:
            return 0.0
        return (hottest - 1) / max(floor - 1, 0.05)

    above = [r for r in rows if excess(r) >= IMBALANCE]
    if above:
        worst = max(above, key=lambda r: r["max_over_mean"])
        ratio, floor = worst["max_over_mean"], worst["max_over_mean_floor"]
        text = (
            f"Layer {worst['layer']} is uneven: its hottest expert has {times(ratio)} the mean "
            f"load, where an unbiased router would give {decimal(floor)}×."
        )
        kind = MODEL if ratio >= 2 else NOTE
        yield Finding(kind, 1 + min(ratio, 100) / 101, text, "experts", _layer(worst["layer"]))


def _routers(rows: Rows) -> Iterable[Finding]:
    rated = [r for r in rows if known(r["entropy_norm"]) is not None]
    lowest = min(rated, key=lambda r: r["entropy_norm"], default=None)
    highest = max(rated, key=lambda r: r["entropy_norm"], default=None)
    if lowest is not None and lowest["entropy_norm"] < CERTAIN:
        value, layer = lowest["entropy_norm"], lowest["layer"]
        text = f"The router of layer {layer} has collapsed to near certainty: its entropy is "
        text += f"{percent(value)} of what is possible."
        yield Finding(MODEL, 2 - value, text, "router", _layer(layer))
    if highest is not None and highest["entropy_norm"] > UNDECIDED:
        value, layer = highest["entropy_norm"], highest["layer"]
        text = f"The router of layer {layer} hardly tells experts apart: its entropy is "
        text += f"{percent(value)} of what is possible."
        yield Finding(NOTE, value, text, "router", _layer(layer))
    nonfinite = total(rows, "nonfinite_tokens")
    if nonfinite:
        text = f"The logits of {count(nonfinite)} tokens (summed over layers) were not finite."
        yield Finding(MODEL, 6, text, "router")


def _tags(rows: Rows) -> Iterable[Finding]:
    rated = [r for r in rows if known(r["loss"]) is not None and r["loss_tokens"]]
    if len(rated) < 2:
        return
    weight = sum(r["loss_tokens"] for r in rated)
    mean = sum(r["loss"] * r["loss_tokens"] for r in rated) / weight
    worst = max(rated, key=lambda r: r["loss"])
    if mean > 0 and worst["loss"] >= WORSE * mean:
        text = f"Tag {worst['tag']} has the highest loss: {decimal(worst['loss'])}, where the mean "
        text += f"is {decimal(mean)}."
        yield Finding(NOTE, worst["loss"] / mean / 100, text, "requests", {"tag": worst["tag"]})


def _layer(layer: int) -> dict[str, Any]:
    return {"first_layer": layer, "last_layer": layer}


def known(value: Any) -> float | None:
    """A number, or None for null and NaN (which is how pandas says null)."""
    return None if value is None or value != value else float(value)


def total(rows: Rows, column: str) -> int:
    """Sum of a column of counts; nulls count nothing."""
    return int(sum(known(r[column]) or 0 for r in rows))
