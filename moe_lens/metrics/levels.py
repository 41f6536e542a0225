"""Alarms of what a phase is as a whole: experts dead or hot, loads uneven, choices dropped.

Each takes the layers that can be judged and a probability of false alarms that is for all of them
together, and has a function that says why a layer cannot be judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moe_lens.metrics.balance import max_vio
from moe_lens.metrics.watched import Fired, Watched

HOT_SHARE = 0.5
"""Share of tokens that one expert may have; where chance is above half of it, twice that."""
IMBALANCE = 1.0
"""What MaxVio may be above its noise floor: the hottest expert then has twice its part."""
DROPS = 0.05
"""What the dropped rate may be above that of a uniform router at the same capacity."""


def beyond_uniform(share: float, chance: float, tokens: float) -> float:
    """A bound on the probability that an expert's share of tokens is as far from chance.

    exp(-T KL(F || k/E)), Chernoff's: holds at any T, on either side; (1 - k/E)^T at F = 0.

    Args:
        share: F, share of tokens that chose it.
        chance: k/E.
        tokens: T, independent ones.
    """
    parts = ((share, chance), (1 - share, 1 - chance))
    if any(seen > 0 >= due for seen, due in parts):
        return 0.0
    kl = sum(seen * np.log(seen / due) for seen, due in parts if seen > 0)
    return float(np.exp(-tokens * kl))


def tokens_for_dead(experts: int, top_k: float, delta: float) -> float:
    """T >= ln(E / delta) / -ln(1 - k/E): tokens of which a uniform router misses no expert.

    Args:
        experts: E.
        top_k: k.
        delta: Probability that it misses any after all.
    """
    if top_k >= experts:
        return 1.0
    return float(np.ceil(np.log(experts / delta) / -np.log1p(-top_k / experts)))


def dead(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """Experts that nobody chose, among tokens enough to say so."""
    for x in layers:
        needed = tokens_for_dead(x.experts, x.top_k, level / len(layers))
        for expert in np.flatnonzero(x.counts_E == 0).tolist():
            if x.effective_tokens >= needed:
                tokens = f"{x.tokens_C.sum():,.0f} tokens (worth {x.effective_tokens:,.0f})"
                yield Fired(
                    "dead", x.layer, expert, 0.0, 1.0,
                    f"layer {x.layer}: none of {tokens} chose expert {expert}; {needed:,.0f} "
                    "independent ones would be enough to miss none by chance",
                )  # fmt: skip


def hot(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """Experts that most tokens choose."""
    for x in layers:
        bound = max(HOT_SHARE, 2 * x.top_k / x.experts)
        share_E = x.counts_E / x.tokens_C.sum()
        for expert in np.flatnonzero(share_E > bound).tolist():
            share = min(float(share_E[expert]), 1.0)
            if _rare(x, share, level / len(layers)):
                yield Fired(
                    "hot", x.layer, expert, share, bound,
                    f"layer {x.layer}: {share:.0%} of tokens chose expert {expert}; a uniform "
                    f"router gives it {x.top_k / x.experts:.1%}, {bound:.0%} is the bound",
                )  # fmt: skip


def imbalance(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """The hottest expert has far more than its part."""
    for x in layers:
        found, floor = float(max_vio(x.counts_E)), noise_floor(x)
        expert = int(x.counts_E.argmax())
        share = min(float(x.counts_E[expert] / x.tokens_C.sum()), 1.0)
        if found > floor + IMBALANCE and _rare(x, share, level / len(layers)):
            yield Fired(
                "imbalance", x.layer, expert, found, floor + IMBALANCE,
                f"layer {x.layer}: expert {expert} has {1 + found:.1f} times the mean load "
                f"(MaxVio {found:.2f}; noise makes it {floor:.2f}, {floor + IMBALANCE:.2f} is the "
                "bound)",
            )  # fmt: skip


def noise_floor(x: Watched) -> float:
    """What MaxVio is about by chance: sqrt(2 ln E (1 - k/E) / mu), mu of effective tokens."""
    chance = min(x.top_k / x.experts, 1.0)
    mu = x.effective_tokens * chance
    return float(np.sqrt(2 * np.log(x.experts) * (1 - chance) / mu))


def _rare(x: Watched, share: float, level: float) -> bool:
    bound = beyond_uniform(share, x.top_k / x.experts, x.effective_tokens)
    return x.experts * bound <= level


def drops(layers: Sequence[Watched], level: float) -> Iterable[Fired]:
    """More is lost than unlucky draws lose."""
    for x in layers:
        chance = x.dropped_by_chance
        if x.dropped is None or chance is None:  # `no_drops` keeps such layers out
            continue
        bound = chance.expected + DROPS
        if x.dropped > bound and chance.beyond(x.dropped) == "high":
            yield Fired(
                "drops", x.layer, None, x.dropped, bound,
                f"layer {x.layer}: {x.dropped:.1%} of choices were dropped; a uniform router loses "
                f"{chance.expected:.1%} at this capacity, {bound:.1%} is the bound",
            )  # fmt: skip


def few_tokens(x: Watched) -> str:
    """Why the loads of a layer cannot be judged; empty: they can."""
    if x.experts_choose:
        return "experts choose their tokens here: loads are equal by that"
    if x.blocks < 2:
        return "fewer than two blocks of steps: no telling how much they differ by chance"
    return ""


def no_drops(x: Watched) -> str:
    """Why its drops cannot."""
    if x.dropped is None:
        return "no capacity: the layer is dropless"
    known = x.dropped_by_chance is not None
    return "" if known else "no capacity was in force, or windows hold several forwards"
