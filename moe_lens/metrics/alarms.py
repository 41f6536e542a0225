"""Alarms: what is wrong enough with a run's routing that somebody should look, and no more.

An alarm fires where a number is beyond what chance makes of it and beyond a stated size: with many
tokens the smallest difference is beyond chance, with few tokens the largest is not. Chance is that
of routing that stays as it is; all alarms of all layers of one phase together fire by chance on at
most `FALSE_ALARMS` of phases (benchmarks/alarms.py measures it; docs/check.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moe_lens.metrics import changes, levels
from moe_lens.metrics.watched import Fired, Watched

FALSE_ALARMS = 0.01
"""Of phases in which nothing is wrong, the share in which any alarm may fire."""
BLOCKS = 32
"""Blocks that a run is cut into at most; a change is found to within one."""

Judge = Callable[[Sequence[Watched], float], Iterable[Fired]]
"""Of layers that can be judged, at a probability of false alarms that is for all of them."""


@dataclass(frozen=True)
class Verdict:
    """What an alarm says of a phase.

    Attributes:
        alarm: Its name.
        fired: Where it fired.
        judged: Layers that could be judged.
        lacks: Why the others could not, with their layers.
    """

    alarm: str
    fired: tuple[Fired, ...]
    judged: tuple[int, ...]
    lacks: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        name: As on the command line.
        looks_at: What it is made of.
        fires: When, in words.
        lacks: Why a layer cannot be judged; empty: it can.
        judge: The rule.
    """

    name: str
    looks_at: str
    fires: str
    lacks: Callable[[Watched], str]
    judge: Judge


def check(layers: Sequence[Watched], names: Iterable[str] | None = None) -> list[Verdict]:
    """What the alarms say of the layers of a phase.

    Args:
        layers: All of the same blocks.
        names: Only these alarms. Each has its part of the false alarms whether the others are
            asked or not, so that no answer depends on what else was asked.
    """
    wanted = set(ALARMS if names is None else names)
    chosen = [a for a in ALARMS.values() if a.name in wanted]
    return [_verdict(alarm, layers, FALSE_ALARMS / len(ALARMS)) for alarm in chosen]


def _verdict(alarm: Alarm, layers: Sequence[Watched], level: float) -> Verdict:
    why = {x.layer: alarm.lacks(x) for x in layers}
    able = [x for x in layers if not why[x.layer]]
    lacks: dict[str, tuple[int, ...]] = {}
    for layer, reason in why.items():
        if reason:
            lacks[reason] = (*lacks.get(reason, ()), layer)
    fired = tuple(alarm.judge(able, level)) if able else ()
    return Verdict(alarm.name, fired, tuple(x.layer for x in able), lacks)


ALARMS = {
    a.name: a
    for a in (
        Alarm(
            "dead", "experts without a choice",
            "none of T effective tokens chose it, T enough that a uniform router misses none",
            levels.few_tokens, levels.dead,
        ),
        Alarm(
            "hot", "share of tokens of one expert",
            f"above {levels.HOT_SHARE:.0%}, and above twice k/E",
            levels.few_tokens, levels.hot,
        ),
        Alarm(
            "imbalance", "MaxVio", f"above its noise floor by {levels.IMBALANCE:g}",
            levels.few_tokens, levels.imbalance,
        ),
        Alarm(
            "drift", "shares of experts before and after the best split",
            f"PSI above its noise floor by {changes.DRIFT:g}", changes.no_drift, changes.drift,
        ),
        Alarm(
            "z_loss", "mean z-loss over time", f"more than {changes.Z_GROWTH:g} times what it was",
            changes.no_series("z_loss_C", "no z-loss"), changes.z_loss,
        ),
        Alarm(
            "entropy", "mean token entropy over time",
            f"less than {changes.COLLAPSE:g} of what it was",
            changes.no_series("entropy_C", "no token entropy"), changes.entropy,
        ),
        Alarm(
            "drops", "share of choices dropped",
            f"above a uniform router's at the same capacity by {levels.DROPS:g}",
            levels.no_drops, levels.drops,
        ),
    )
}  # fmt: skip
"""By name."""
