"""How sure a router is: of single tokens, and how much its choice depends on the token.

What is a mean over tokens comes from sums over every token (stored question `router_confidence`);
what needs the whole distribution of a token comes from recorded logits: some tokens, in bfloat16.
A selection score is not always a probability: `margin` is in the score's unit, and routers that
rank by something else than their logits (a bias, groups) have a boundary that logits do not show.

Legend: T tokens, V outputs of the router (experts, and zero-compute ones), E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.balance import entropy, shares
from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Chance, Floats
from moe_lens.metrics.evidence import Answer, Bools


def probabilities(logits_TV: Floats, score: str) -> Floats:
    """What logits mean, `[T, V]`: softmax; or sigmoid, sqrtsoftplus, divided by their sum.

    Raises:
        ValueError: Another score.
    """
    z = np.asarray(logits_TV, float)
    if score == "softmax":
        positive = np.exp(z - z.max(-1, keepdims=True))
    elif score == "sigmoid":
        positive = np.exp(-np.logaddexp(0, -z))
    elif score == "sqrtsoftplus":
        positive = np.sqrt(np.logaddexp(0, z))
    else:
        raise ValueError(f"score is softmax, sigmoid or sqrtsoftplus; got {score!r}")
    return np.asarray(positive / positive.sum(-1, keepdims=True))


def _undecided(outputs: int) -> Chance:
    return Chance(float(np.log(outputs)))


@metric(
    group="confidence",
    formula="H_tok = mean over tokens of -sum p ln p, the router's full distribution",
    range="0 to ln V",
    unit="nats",
    null="ln V: a router that knows nothing",
    chance=_undecided,
)
def token_entropy(router_confidence: Answer) -> float | None:
    """0: every token is certain; ln V: undecided. Not the entropy of the load.

    Home: the stored question `router_confidence`; sums over every token.
    """
    return router_confidence["entropy"]


@metric(
    group="confidence",
    formula="H(P) = -sum P ln P, P the mean of p over tokens",
    range="H_tok to ln V",
    unit="nats",
    null="ln V: no output is preferred",
    chance=_undecided,
)
def mean_entropy(prob_V: Floats) -> Any:
    """Where tokens go in the mean.

    High with a low H_tok: sure, and different for different tokens. Both low: collapse. Both
    high: undecided.
    """
    return entropy(prob_V)


@metric(
    group="confidence",
    formula="H(P) - H_tok = I(token; expert)",
    range="0 to ln V",
    unit="nats",
    null="0: the distribution does not depend on the token",
    chance=lambda: Chance(0.0),
)
def routing_information(prob_V: Floats, router_confidence: Answer) -> float | None:
    """How much the token says about where it goes; 0: all tokens get the same distribution."""
    token = router_confidence["entropy"]
    return None if token is None else float(entropy(prob_V)) - token


@metric(
    group="confidence",
    formula="mean over tokens of max p",
    range="1/V to 1",
    null="1/V: undecided",
    chance=lambda outputs: Chance(1 / outputs),
)
def top1_prob(router_confidence: Answer) -> float | None:
    """How much of itself a router puts on its first choice.

    Home: the stored question `router_confidence`.
    """
    return router_confidence["top1_prob"]


@metric(
    group="confidence",
    formula="mean over tokens of the k-th minus the next selection score",
    range="0 and up",
    unit="of the selection score",
    null="none: it depends on the score's scale",
)
def margin(router_confidence: Answer) -> float | None:
    """How far a token is from another choice, in the score that decides.

    Home: the stored question `router_confidence`.
    """
    return router_confidence["margin"]


@metric(
    group="confidence",
    formula="mean over tokens of p(1) - p(2)",
    range="0 to 1",
    null="0: undecided",
    chance=lambda: Chance(0.0),
)
def top1_margin(prob_TV: Floats) -> float:
    """How clear the first choice is."""
    best = -np.partition(-prob_TV, 1, axis=-1)[:, :2]
    return float((best[:, 0] - best[:, 1]).mean())


@metric(
    group="confidence",
    formula="mean over tokens of z(k) - z(k+1)",
    range="0 and up",
    unit="logits",
    null="none: it depends on the logits' scale",
)
def boundary_margin(logits_TV: Floats, top_k: int) -> float:
    """What a change of precision, or of engine, must move to change the choice.

    Of routers that
    rank by their logits.
    """
    if top_k >= logits_TV.shape[-1]:
        return float("nan")
    upper, lower = _boundary(logits_TV, top_k)
    return float((upper - lower).mean()) if len(upper) else float("nan")


@metric(
    group="confidence",
    formula="share of tokens with z(k) - z(k+1) below one bfloat16 step at z(k)",
    range="0 to 1",
    source="step at 2 <= |z| < 4: 0.0156, ST-MoE (Zoph et al. 2022), fig. 2",
    null="none: it depends on the logits' scale",
)
def bf16_ties(logits_TV: Floats, top_k: int) -> float:
    """Tokens that rounding alone may route elsewhere: recomputing, another engine.

    The stored question `near_ties` has the distribution of margins in the score that decides.
    """
    if top_k >= logits_TV.shape[-1]:
        return float("nan")
    upper, lower = _boundary(logits_TV, top_k)
    close = upper - lower < bf16_step(upper)
    return float(close.mean()) if len(close) else float("nan")


def _boundary(logits_TV: Floats, top_k: int) -> tuple[Floats, Floats]:
    """z(k) and z(k+1) of the tokens for which they are numbers: others are masked out there."""
    best = -np.sort(np.partition(-logits_TV, top_k, axis=-1)[:, : top_k + 1], -1)
    usable_T = np.isfinite(best[:, top_k])
    return best[usable_T, top_k - 1], best[usable_T, top_k]


def bf16_step(z: Floats) -> Floats:
    """Distance to the next larger bfloat16 number at |z|: 2^(floor(log2 |z|) - 7)."""
    size = np.maximum(np.abs(z), np.finfo(np.float32).tiny)
    return np.asarray(np.exp2(np.floor(np.log2(size)) - 7))


@metric(
    group="confidence",
    formula="mean over tokens of the sum of p over the chosen",
    range="0 to 1",
    null="k/V: undecided",
    chance=lambda outputs, top_k: Chance(top_k / outputs),
)
def top_k_mass(prob_TV: Floats, chosen_TV: Bools) -> float:
    """How much of the distribution the k experts stand for; what renormalising hides."""
    return float((prob_TV * chosen_TV).sum(-1).mean())


@metric(
    group="confidence",
    formula="mean over tokens of -sum g ln g, g the gate weights divided by their sum",
    range="0 to ln k",
    unit="nats",
    null="ln k: all weigh alike",
    chance=lambda top_k: Chance(float(np.log(top_k))),
)
def gate_entropy(weight_TV: Floats) -> float:
    """How evenly a token's experts contribute; not comparable with H_tok."""
    used = weight_TV[weight_TV.sum(-1) > 0]
    return float(entropy(shares(used)).mean()) if len(used) else float("nan")


@metric(
    group="confidence",
    formula="mean |z| over tokens and outputs",
    range="0 and up",
    unit="logits",
    null="none",
)
def logit_scale(logits_TV: Floats) -> float:
    """Scale of the logits: growing ones lose precision, and saturate the router."""
    return float(np.abs(logits_TV[np.isfinite(logits_TV)]).mean())


@metric(
    group="confidence",
    formula="max |z| over tokens and outputs",
    range="0 and up",
    unit="logits",
    null="none",
)
def logit_max(logits_TV: Floats) -> float:
    """The extreme of it: where overflow or an outlier token begins."""
    return float(np.abs(logits_TV[np.isfinite(logits_TV)]).max())


@metric(
    group="confidence",
    formula="1/2 sum |n_i / N - G_i / G|, G_i the sum of gate weights on expert i",
    range="0 to 1",
    null="none: with equal weights it is 0",
)
def gate_gap(counts_E: NDArray[Any], gate_E: Floats) -> Any:
    """Share of the gate mass that lies elsewhere than the counts say.

    Experts chosen often but weighed little, or the other way round.
    """
    return np.abs(shares(counts_E) - shares(gate_E)).sum(-1) / 2
