"""The selection bias of loss-free balancing: how it moves, and whose choice it changes.

A router with such a bias chooses by score + b and weighs by the score alone; after each step b of
an expert with too much load goes down by u, of the others up (Wang et al., arXiv 2408.15664). A
trace says that there is a bias, not its values: `moe_lens_hooks.selection_biases` reads them from
the model, here they are looked at. What b changes can be told from logits and choices alone.

Legend: S steps (times at which b was read), E experts, T tokens, V outputs of the router, G groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moe_lens.metrics.chance import Floats
from moe_lens.metrics.confidence import bf16_step
from moe_lens.metrics.evidence import Bools

_SELECTION = re.compile(r"(\w+)\+bias(?:, groups by top-(\d+))?")


@dataclass(frozen=True)
class Ranking:
    """How a router with a selection bias would choose without it.

    Attributes:
        score: What ranks: logits, softmax, sigmoid or sqrtsoftplus. All rise with the logit.
        groups: Into which outputs are divided, of which only the best may be used; None: all may.
        top_groups: How many.
        best: A group is as good as the sum of so many of its best scores.
    """

    score: str
    groups: int | None = None
    top_groups: int | None = None
    best: int = 1


def ranking(selection: str | None, groups: int | None, top_groups: int | None) -> Ranking | None:
    """From what a trace says of a layer (`moe_layers`); None: no bias, or not known."""
    said = _SELECTION.fullmatch(selection or "")
    if said is None:
        return None
    score, best = said.groups()
    return Ranking(score) if best is None else Ranking(score, groups, top_groups, int(best))


def spread(bias_SE: ArrayLike) -> Floats:
    """Largest minus smallest b at each time, `[S]`: how far scores are bent to balance the load.

    Growing without end: the bias cannot reach balance, or pushes against what the router learns.
    """
    return np.asarray(np.ptp(_steps(bias_SE), axis=1))


def sign_flip_rate(bias_SE: ArrayLike) -> float:
    """How often a step of b goes against the one before it, of all pairs of steps of an expert.

    About 0: b is still on its way (u too small, or just begun). 1/2: at balance, where the sign is
    noise. Towards 1: it overshoots, u is too large. The steps have to be those of the updates, one
    after the other: read less often, b shows its drift and not its steps. Steps of 0 are left out.

    Returns:
        NaN below three times, or where b does not move.
    """
    moved = np.sign(np.diff(_steps(bias_SE), axis=0))
    pairs = moved[1:] * moved[:-1]
    used = pairs[pairs != 0]
    return float((used < 0).mean()) if used.size else float("nan")


def changed(logits_TV: Floats, chosen_TV: Bools, rank: Ranking) -> Bools:
    """Whether the router would have chosen another set without its bias, `[T]`.

    Among equal scores any choice counts as unchanged: which of them a top-k takes differs between
    devices, and logits are recorded in bfloat16, where near ties become ties.
    """
    z_TV = _limited(logits_TV, _groups(logits_TV, chosen_TV, rank))
    worst_T = np.where(chosen_TV, z_TV, np.inf).min(1)
    other_T = np.where(chosen_TV, -np.inf, z_TV).max(1)
    return np.asarray(worst_T < other_T)


def unsure(logits_TV: Floats, chosen_TV: Bools, rank: Ranking) -> Bools:
    """Whether rounding logits to bfloat16 may decide `changed`, `[T]`.

    The boundary between what would be chosen and what not, of outputs or of groups, is then closer
    than the logits are known.
    """
    used_TG = _groups(logits_TV, chosen_TV, rank)
    z_TV = _limited(logits_TV, used_TG)
    k = int(chosen_TV.sum(1).max(initial=0))
    if not 0 < k < z_TV.shape[1]:
        return np.zeros(len(z_TV), bool)
    best = -np.sort(np.partition(-z_TV, k, axis=1)[:, : k + 1], axis=1)
    upper_T, lower_T = best[:, k - 1], best[:, k]
    with np.errstate(invalid="ignore"):
        close_T = np.isfinite(lower_T) & (upper_T - lower_T < bf16_step(upper_T))
    if used_TG is None:
        return np.asarray(close_T)
    half_TV = np.where(np.isfinite(logits_TV), bf16_step(logits_TV) / 2, 0)
    top_T = logits_TV.max(1, keepdims=True)
    low_TG = _by_group(logits_TV - half_TV, top_T, rank)
    high_TG = _by_group(logits_TV + half_TV, top_T, rank)
    worst_T = np.where(used_TG, low_TG, np.inf).min(1)
    return np.asarray(close_T | (worst_T < np.where(used_TG, -np.inf, high_TG).max(1)))


def _limited(logits_TV: Floats, used_TG: Bools | None) -> Floats:
    """The logits, -inf in groups that may not be used."""
    if used_TG is None:
        return logits_TV
    allowed_TV = np.repeat(used_TG, logits_TV.shape[1] // used_TG.shape[1], axis=1)
    return np.where(allowed_TV, logits_TV, -np.inf)


def _groups(logits_TV: Floats, chosen_TV: Bools, rank: Ranking) -> Bools | None:
    """The best groups without the bias, `[T, G]`; among equal ones those that were used.

    None: no groups limit the choice.
    """
    if rank.groups is None or rank.top_groups is None:
        return None
    value_TG = _by_group(logits_TV, logits_TV.max(1, keepdims=True), rank)
    used_TG = chosen_TV.reshape(*value_TG.shape, -1).any(2)
    order_TG = np.lexsort((used_TG, value_TG), axis=1)
    out_TG = np.zeros_like(used_TG)
    np.put_along_axis(out_TG, order_TG[:, -rank.top_groups :], True, axis=1)
    return out_TG


def _by_group(z_TV: Floats, top_T: Floats, rank: Ranking) -> Floats:
    """Sum of the best scores of each group, `[T, G]`; a softmax up to a factor of the token."""
    z_TGM = z_TV.reshape(len(z_TV), rank.groups or 1, -1)
    # Scores rise with the logit, so the best logits of a group have its best scores.
    most = min(rank.best, z_TGM.shape[2])
    best_TGB = np.partition(z_TGM, -most, axis=2)[:, :, -most:]
    if rank.score == "softmax":
        best_TGB = np.exp(best_TGB - top_T[:, :, None])
    elif rank.score == "sigmoid":
        best_TGB = np.exp(-np.logaddexp(0, -best_TGB))
    elif rank.score == "sqrtsoftplus":
        best_TGB = np.sqrt(np.logaddexp(0, best_TGB))
    return np.asarray(best_TGB.sum(2))


def _steps(bias_SE: ArrayLike) -> Floats:
    bias = np.asarray(bias_SE, float)
    if bias.ndim != 2:
        raise ValueError(f"biases are [S, E], a row for each step; got shape {bias.shape}")
    return bias
