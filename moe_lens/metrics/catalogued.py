"""What was measured of a phase, in words: one sentence, and what could not be computed."""

from __future__ import annotations

import math
from typing import Any

from moe_lens.numbers import count, decimal

Said = dict[str, Any]


def sentence(phase: Said) -> str:
    """The answer of a phase: its hottest expert, dead experts, and how much is beyond chance.

    Args:
        phase: `phase`, `layers` (each with `layer` and `metrics`: name to `value`, `chance`,
            `chance_high`, `beyond`, `lacks`).
    """
    layers = phase["layers"]
    parts = [f"{phase['phase']}, {len(layers)} layer{'s' * (len(layers) != 1)}"]
    parts += [words for words in (_hottest(layers), _dead(layers)) if words]
    tested = [x for row in layers for x in row["metrics"].values() if _tested(x)]
    beyond = sum(x["beyond"] != "" for x in tested)
    parts.append(
        f"{count(beyond)} of {count(len(tested))} values are beyond chance"
        if tested
        else "no value with a null that was drawn"
    )
    return f"{parts[0]}: {'; '.join(parts[1:])}."


def lacking(phase: Said) -> list[Said]:
    """What could not be computed: `lacks`, `level`, `metrics`, `layers`; alike ones together."""
    levels = {m["name"]: m["level"] for m in phase["catalogue"]}
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in levels:
        by_reason: dict[str, list[int]] = {}
        for row in phase["layers"]:
            if lacks := row["metrics"][name]["lacks"]:
                by_reason.setdefault(lacks, []).append(row["layer"])
        for lacks, layers in by_reason.items():
            found.setdefault((lacks, tuple(layers)), []).append(name)
    return [
        {
            "lacks": lacks,
            "level": "".join(sorted(set("".join(levels[name] for name in names)))),
            "layers": list(layers),
            "metrics": names,
        }
        for (lacks, layers), names in found.items()
    ]


def _hottest(layers: list[Said]) -> str:
    known = [
        (x["value"], row["layer"], x["chance"])
        for row in layers
        if (x := row["metrics"].get("max_over_mean")) and not math.isnan(x["value"])
    ]
    if not known:
        return ""
    value, layer, chance = max(known)
    by_chance = "" if chance is None else f", {decimal(chance)} by chance"
    return f"the hottest expert takes {decimal(value)} times the mean (layer {layer}{by_chance})"


def _dead(layers: list[Said]) -> str:
    known = [
        x["value"]
        for row in layers
        if (x := row["metrics"].get("dead_experts")) and not math.isnan(x["value"])
    ]
    if not known:
        return ""
    dead = sum(known)
    return f"{count(dead)} dead expert{'s' * (dead != 1)}" if dead else "no dead experts"


def _tested(x: Said) -> bool:
    return not x["lacks"] and x["chance_high"] is not None
