"""What a placement costs and saves: a row for each placement, phase and layer, and a sentence.

Ratios are of sums over forwards: the slowest rank of each forward, summed, over the mean rank,
summed. It is the slowest of each forward that all others wait for, not the one that is slowest in
total.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_lens.replay.ep.counted import Row
from moe_lens.replay.summary import ENOUGH

Summary = dict[str, Any]


def by_layer(rows: list[Row]) -> list[Summary]:
    """A row for each placement, phase and layer, in the order in which they ran."""
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["placement"], row["phase"], row["layer"]].append(row)
    placements, phases = _order(rows, "placement"), _order(rows, "phase")
    keys = sorted(groups, key=lambda k: (placements.index(k[0]), phases.index(k[1]), k[2]))
    return [{"placement": k[0], "phase": k[1], "layer": k[2], **_summed(groups[k])} for k in keys]


def of_phase(rows: list[Row], placement: str, phase: str) -> Summary:
    """All layers of a phase together."""
    return _summed([r for r in rows if (r["placement"], r["phase"]) == (placement, phase)])


def answers(rows: list[Row], about: dict[str, Any]) -> list[str]:
    """A sentence for each phase: how far the slowest rank is from the mean, and what that costs."""
    return [_answer(rows, phase, about) for phase in _order(rows, "phase")]


def _order(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _summed(rows: list[Row]) -> Summary:
    ranks = rows[0]["ep_ranks"]
    forwards: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        forwards[row["layer"], row["step"], row["forward"]].append(row)

    def table(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([[row[name] for row in of] for of in forwards.values()], np.float64)

    rows_FR, busy_FR = table("rows"), table("busy_ns")
    slowest_F = busy_FR.max(axis=1)
    # Measured by each rank: the exchange is over when the last of them is done.
    dispatch_F, combine_F = table("dispatch_ns").max(axis=1), table("combine_ns").max(axis=1)
    layer_F = dispatch_F + slowest_F + combine_F
    return {
        "forwards": len({(row["step"], row["forward"]) for row in rows}),
        "ranks": ranks,
        "rows_mean": float(rows_FR.mean()),
        "rows_slowest": float(rows_FR.max(axis=1).mean()),
        "rows_max_over_mean": _ratio(rows_FR.max(axis=1).sum(), rows_FR.mean(axis=1).sum()),
        "busy_mean_ns": float(busy_FR.mean()),
        "busy_slowest_ns": float(slowest_F.mean()),
        "time_max_over_mean": _ratio(slowest_F.sum(), busy_FR.mean(axis=1).sum()),
        "waiting_share": _ratio(table("wait_ns").sum(), ranks * slowest_F.sum()),
        "touched_mean": float(table("touched").mean()),
        "sent_rows_mean": float(table("sent_rows").mean()),
        "sent_bytes_mean": float(table("sent_bytes").mean()),
        "busiest_bytes": float(
            np.maximum(table("sent_bytes").max(axis=1), table("received_bytes").max(axis=1)).mean()
        ),
        "dispatch_ns": float(dispatch_F.mean()),
        "combine_ns": float(combine_F.mean()),
        "layer_ns": float(layer_F.mean()),
        "total_ns": float(layer_F.sum()),
        "experts_ns": float(slowest_F.sum()),
        "noise_ns": math.sqrt(float((table("noise_ns").max(axis=1) ** 2).sum())),
    }


def _answer(rows: list[Row], phase: str, about: dict[str, Any]) -> str:
    placement, baseline = about["placement"], about["baseline"]
    with_copies = f" with {placement['replicas']} replicas" if placement["replicas"] else ""
    name = placement["name"].split("+")[0]
    own = of_phase(rows, placement["name"], phase)
    head = f"{phase}: {placement['ranks']} ranks, {name}{with_copies}"
    if math.isnan(own["rows_max_over_mean"]):
        return f"{head}: no expert computed anything."
    timed = about["mode"] == "simulated" or about["device"] != "cpu"
    what = "time_max_over_mean" if timed else "rows_max_over_mean"
    verb = "takes" if timed else "computes"
    of = "time" if timed else "rows"
    text = f"{head}: the slowest rank {verb} {own[what]:.2f} times the mean rank's {of}"
    if baseline is not None:
        other = of_phase(rows, baseline, phase)
        text += f" (contiguous: {other[what]:.2f})"
        if timed:
            text += f"; {_gain(own, other, about)}"
    elif timed:
        text += f"; ranks wait {own['waiting_share']:.1%} of their time".replace("%", " %")
    return f"{text} ({_count(own['forwards'], 'forward')})."


def _gain(own: Summary, other: Summary, about: dict[str, Any]) -> str:
    """What a layer takes beside the same layer with experts in their order.

    On a CPU its experts alone: an all-to-all of GPUs beside a CPU's time is no layer of anybody's.
    """
    on_cpu = about["device"] == "cpu"
    time, takes = ("experts_ns", "its experts take") if on_cpu else ("total_ns", "a layer takes")
    if own["forwards"] < ENOUGH:
        ratio = own[time] / other[time]
        return f"{takes} {ratio:.2f} times as long; too few to call it more or less"
    saved = 1 - own[time] / other[time]
    noise = math.hypot(own["noise_ns"], other["noise_ns"]) / other[time]
    if abs(saved) <= noise:
        return f"{takes} as long, within the noise of {100 * noise:.1f} %"
    word = "less" if saved > 0 else "more"
    return f"{takes} {100 * abs(saved):.0f} % {word} time"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else math.nan
