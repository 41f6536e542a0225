"""What was measured, in a row for each phase and layer, and in one sentence.

Percentiles are over the forwards of the trace, and None where there are too few of them; what
repeats of a forward differ by is noise, and stands apart. Ratios are of sums over the forwards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.numbers import percent
from moe_lens.replay.floors import STAGES

if TYPE_CHECKING:
    from moe_lens.replay.floors import Ceiling
    from moe_lens.replay.measure import Row

Summary = dict[str, Any]

P90_FROM, P99_FROM = 10, 100
"""Forwards from which on one lies above the percentile; of fewer it would be their slowest."""

ENOUGH = 3
"""Forwards from which on a difference is called one: noise of one or two is not known well."""


def by_layer(rows: list[Row]) -> list[Summary]:
    """A row for each phase and layer, phases in the order in which they ran."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["phase"], row["layer"]].append(row)
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    order = sorted(groups, key=lambda key: (phases.index(key[0]), key[1]))
    return [{"phase": key[0], "layer": key[1], **_summed(groups[key])} for key in order]


def by_phase(rows: list[Row]) -> list[Summary]:
    """A row for each phase, all layers together."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["phase"]].append(row)
    return [
        {"phase": phase, "layers": len({row["layer"] for row in found}), **_summed(found)}
        for phase, found in groups.items()
    ]


def _summed(rows: list[Row]) -> Summary:
    def column(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([row[name] for row in rows], np.float64)

    time, again = column("time_ns"), column("again_ns")
    total = float(time.sum())
    p50, p90, p99 = (float(p) for p in np.percentile(time, [50, 90, 99]))
    forwards = len({(row["rank"], row["step"], row["forward"]) for row in rows})
    slots, dropped = int(column("slots").sum()), int(column("dropped").sum())
    # Errors of single forwards cancel in part when they are summed; what they share does not.
    drift = abs(float((again - time).sum())) / total
    spread = math.sqrt(float((column("noise_ns") ** 2).sum())) / total
    return {
        "forwards": forwards,
        "tokens": int(column("tokens").sum()),
        "time_ns": total,
        "p50_ns": p50,
        "p90_ns": p90 if forwards >= P90_FROM else None,
        "p99_ns": p99 if forwards >= P99_FROM else None,
        "max_ns": float(time.max()),
        "noise": max(drift, spread),
        "floor_ns": float(np.median(column("floor_ns"))),
        "over_floor": total / _or_nan(float(column("floor_ns").sum())),
        "balanced_ns": float(np.median(column("balanced_ns"))),
        "over_balanced": total / _or_nan(float(column("balanced_ns").sum())),
        "same_touched_ns": float(np.median(column("same_touched_ns"))),
        "over_same_touched": total / _or_nan(float(column("same_touched_ns").sum())),
        "touched": float(np.median(column("touched"))),
        "rows_min": int(column("rows_min").min()),
        "rows_median": float(np.median(column("rows_median"))),
        "rows_max": int(column("rows_max").max()),
        "padded_share": float(column("padded_rows").sum()) / _or_nan(slots - dropped),
        "slots": slots,
        "dropped": dropped,
        "rerouted": int(column("rerouted").sum()),
        "flop_per_s": 1e9 * float(column("flop").sum()) / total,
        "bytes_per_s": 1e9 * float(column("bytes").sum()) / total,
        "stages_ns": _stages(rows),
    }


def _stages(rows: list[Row]) -> dict[str, float] | None:
    """Median time of each stage, where stages were measured."""
    found = {
        name: [row[f"{name}_ns"] for row in rows if row[f"{name}_ns"] is not None]
        for name in STAGES
    }
    medians = {name: float(np.median(times)) for name, times in found.items() if times}
    return medians or None


def differs(ratio: float, noise: float) -> bool:
    """Whether a ratio is farther from 1 than noise: below, no difference is shown."""
    return abs(ratio - 1) > noise


def answers(rows: list[Row]) -> list[str]:
    """How much this routing costs beside a balanced one: a sentence for each phase."""
    return [_answer(found) for found in by_phase(rows)]


def beaten(rows: list[Row], ceiling: Ceiling) -> list[dict[str, Any]]:
    """Ceilings that a forward went beyond, which a ceiling does not allow: it was measured too low.

    Returns:
        For each such ceiling `what` ("matmul" or "memory"), in how many `forwards` of a layer, and
        `by` how many times it at the most.
    """
    rates = {"matmul": ("flop", ceiling.flop_per_s), "memory": ("bytes", ceiling.bytes_per_s)}
    found = []
    for what, (column, most) in rates.items():
        over = [1e9 * row[column] / row["time_ns"] / most for row in rows if row["time_ns"] > 0]
        above = [ratio for ratio in over if ratio > 1]
        if above:
            found.append({"what": what, "forwards": len(above), "by": max(above)})
    return found


def _answer(of: Summary) -> str:
    ratio, noise = of["over_balanced"], of["noise"]
    count, layers = of["forwards"], of["layers"]
    over = f"{_of(count, 'forward')}, {_of(layers, 'layer')}; A/A noise {_tenths(noise)}"
    if math.isnan(ratio):
        return f"{of['phase']}: no expert computed anything ({over})."
    if count < ENOUGH:
        said = f"{ratio:.2f}× a balanced routing; too few to call it more or less"
        return f"{of['phase']}: {said} ({over})."
    if not differs(ratio, noise):
        text = f"this routing costs what a balanced one costs ({over})"
    else:
        word = "more" if ratio > 1 else "less"
        text = f"this routing costs {_tenths(abs(ratio - 1))} {word} than a balanced one ({over})"
    same = of["over_same_touched"]
    if differs(same, noise) and abs(same - ratio) > noise:
        word = "more" if same > 1 else "less"
        text += (
            f", and {_tenths(abs(same - 1))} {word} than a balanced one over the experts it touches"
        )
    elif differs(ratio, noise) and not differs(same, noise):
        text += ", and as much as a balanced one over the experts it touches"
    if of["dropped"]:
        share = percent(of["dropped"] / of["slots"])
        text += f"; {share} of the choices were dropped, and the balanced twin runs as few"
    return f"{of['phase']}: {text}."


def _tenths(share: float) -> str:
    """A share in percent, no finer than a timing is."""
    return f"{100 * share:.1f} %"


def _of(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _or_nan(value: float) -> float:
    return value if value else math.nan
