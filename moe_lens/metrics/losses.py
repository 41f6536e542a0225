"""Training losses as metrics: what a router would be charged, were it trained with them.

The load-balancing loss is E sum f_i P_i, f_i the share of choices (sum 1), P_i the mean
probability; without its coefficient. Uniform routing gives 1 (Megatron, DeepSeek), or k where f is
summed over the k slots (transformers' Mixtral and OLMoE). Over several layers, transformers
averages f and P over the layers first: another number, which hides the collapse of one layer; here
each layer has its own.

At which scope f and P are averaged before they are multiplied matters (Qiu et al., arXiv
2501.11873): a sequence, a micro-batch (one forward of one rank), all micro-batches of a rank in a
step, all ranks in a step. Groups are weighed by their tokens.

Legend: ... any leading axes (draws), G groups of tokens, F forwards, T tokens, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics import bias
from moe_lens.metrics.balance import Counts, cv2, shares
from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Chance, Floats, Ints, of_draws, of_forwards_drawn
from moe_lens.metrics.evidence import Answer, Bools

_SWITCH = "Switch Transformer (Fedus et al., arXiv 2101.03961), eq. 4 to 6"
_QIU = "Qiu et al. 2025, arXiv 2501.11873"
_NULL = (
    "drawn: between 1 (undecided) and 1 + (1 - k/E) / mu (all probability on the choices), mu of "
    "one group; shown is the upper end"
)


def balancing(counts_E: Counts, prob_E: Floats) -> Any:
    """E sum f_i P_i over the last axis; 1 at uniform f or P.

    Args:
        counts_E: Choices, in any unit.
        prob_E: Mean probability, or a sum of probabilities; over experts.
    """
    return (shares(counts_E) * shares(prob_E)).sum(-1) * np.shape(counts_E)[-1]


def balancing_by_group(
    counts_FE: Counts, prob_FE: Floats, tokens_F: Ints, group_F: NDArray[Any]
) -> Any:
    """Mean of the loss over groups of forwards, weighed by tokens; f and P are of a whole group.

    Args:
        counts_FE: `[..., F, E]`.
        prob_FE: `[..., F, E]`: mean probability in each.
        tokens_F: Tokens of each.
        group_F: Which group it belongs to.
    """
    _, group_F = np.unique(group_F, axis=0, return_inverse=True)
    in_GF = (group_F.ravel() == np.arange(group_F.max() + 1)[:, None]).astype(float)
    loss_G = balancing(in_GF @ counts_FE, in_GF @ (prob_FE * tokens_F[:, None]))
    return (loss_G * (in_GF @ tokens_F)).sum(-1) / tokens_F.sum()


def _certain(draws_RE: Counts) -> Chance:
    """Of a router that puts all probability on what it chooses: f = P."""
    return _upper(of_draws(balancing(draws_RE, draws_RE)))


def _certain_by_group(counts_FE: Counts, tokens_F: Ints, group_F: NDArray[Any]) -> Chance:
    group = np.unique(group_F, axis=0, return_inverse=True)[1].ravel()
    counts = np.asarray(counts_FE, np.int64)
    return _upper(
        of_forwards_drawn(
            _grouped, tokens_F, counts.sum(1), counts.shape[1], tuple(tokens_F), tuple(group)
        )
    )


def _grouped(draws_RFE: Ints, tokens: tuple[int, ...], group: tuple[int, ...]) -> Any:
    """Of a router that puts all probability on what it chooses, in groups of forwards."""
    certain_RFE = shares(draws_RFE)
    return balancing_by_group(draws_RFE, certain_RFE, np.array(tokens), np.array(group))


def _upper(chance: Chance) -> Chance:
    """Below, an undecided router is at 1, and a balanced one may be under it."""
    return Chance(chance.expected, None, chance.high)


_loss = partial(
    metric,
    group="losses",
    range="about 1 to E/k; below 1 where f and P go against each other",
    null=_NULL,
)


@_loss(
    formula="E sum f_i P_i over the whole phase (sum f = 1: uniform gives 1)",
    source=f"{_SWITCH}; f over all k choices as Megatron-LM and DeepSeek",
    chance=_certain,
)
def switch_loss(counts_E: Counts, prob_V: Floats) -> Any:
    """Imbalance of the whole phase, as the balancing loss sees it."""
    return balancing(counts_E, _of_experts(prob_V, counts_E))


@_loss(
    formula="E sum F_i P_i = k times switch_loss (sum F = k: uniform gives k)",
    range="about k to E",
    source="transformers, Mixtral and OLMoE; OLMoE (arXiv 2409.02060), table 6",
    null="k times that of switch_loss",
    chance=lambda draws_RE, top_k: _times(_certain(draws_RE), top_k),
)
def switch_loss_k(counts_E: Counts, prob_V: Floats, top_k: int) -> Any:
    """The same in the convention of transformers: divide by k to compare."""
    return top_k * switch_loss(counts_E, prob_V)


def _sequences_by_chance(chosen_TV: Any, sequence_T: Ints, experts: int) -> Chance:
    tokens_G = np.bincount(sequence_T)
    counts_GE = _by_sequence(chosen_TV, sequence_T)[:, :experts]
    return _certain_by_group(counts_GE, tokens_G, np.arange(len(tokens_G)))


@_loss(
    formula="mean over sequences of E sum f_i P_i, of the sequence",
    source=f"{_QIU}; DeepSeek-V3 (arXiv 2412.19437)",
    chance=_sequences_by_chance,
)
def switch_loss_sequence(
    chosen_TV: NDArray[np.bool_], prob_TV: Floats, sequence_T: Ints, experts: int
) -> Any:
    """Imbalance inside single sequences."""
    tokens_G = np.bincount(sequence_T)
    counts_GE = _by_sequence(chosen_TV, sequence_T)[:, :experts]
    prob_GE = _by_sequence(prob_TV, sequence_T)[:, :experts] / tokens_G[:, None]
    return balancing_by_group(counts_GE, prob_GE, tokens_G, np.arange(len(tokens_G)))


@_loss(
    formula="mean over forwards of E sum f_i P_i, of the forward",
    source=_QIU,
    chance=lambda counts_FE, tokens_F: _certain_by_group(
        counts_FE, tokens_F, np.arange(len(tokens_F))
    ),
)
def switch_loss_micro(counts_FE: Counts, prob_FV: Floats, tokens_F: Ints) -> Any:
    """Imbalance of single forwards, what a loss at micro-batch scope charges."""
    prob_FE = _of_experts(prob_FV, counts_FE)
    return balancing_by_group(counts_FE, prob_FE, tokens_F, np.arange(len(tokens_F)))


@_loss(
    formula="mean over (step, rank) of E sum f_i P_i, of all its forwards",
    source=_QIU,
    chance=lambda counts_FE, tokens_F, step_F, rank_F: _certain_by_group(
        counts_FE, tokens_F, np.stack([step_F, rank_F], 1)
    ),
)
def switch_loss_rank(
    counts_FE: Counts, prob_FV: Floats, tokens_F: Ints, step_F: Ints, rank_F: Ints
) -> Any:
    """Imbalance of what one rank sees in a step, gradient accumulation included."""
    prob_FE = _of_experts(prob_FV, counts_FE)
    return balancing_by_group(counts_FE, prob_FE, tokens_F, np.stack([step_F, rank_F], 1))


@_loss(
    formula="mean over steps of E sum f_i P_i, of all ranks and forwards of the step",
    source=_QIU,
    chance=lambda counts_FE, tokens_F, step_F: _certain_by_group(counts_FE, tokens_F, step_F),
)
def switch_loss_global(counts_FE: Counts, prob_FV: Floats, tokens_F: Ints, step_F: Ints) -> Any:
    """Imbalance of a global batch."""
    prob_FE = _of_experts(prob_FV, counts_FE)
    return balancing_by_group(counts_FE, prob_FE, tokens_F, step_F)


def _gap_by_chance(counts_FE: Counts, tokens_F: Ints, step_F: Ints) -> Chance:
    counts = np.asarray(counts_FE)
    return _upper(
        of_forwards_drawn(
            _gap, tokens_F, counts.sum(1), counts.shape[1], tuple(tokens_F), tuple(step_F)
        )
    )


def _gap(draws_RFE: Ints, tokens: tuple[int, ...], steps: tuple[int, ...]) -> Any:
    micro = _grouped(draws_RFE, tokens, tuple(range(len(tokens))))
    return micro - _grouped(draws_RFE, tokens, steps)


@metric(
    group="losses",
    formula="switch_loss_micro - switch_loss_global = E sum Cov(f_i, P_i) within a step",
    range="0 at one forward a step; below E/k - 1",
    source=_QIU,
    null="drawn: between 0 and the same of a uniform router with all probability on its choices; "
    "shown is the upper end",
    chance=_gap_by_chance,
)
def scope_gap(counts_FE: Counts, prob_FV: Floats, tokens_F: Ints, step_F: Ints) -> Any:
    """Specialisation to what a micro-batch holds, which a loss at that scope punishes."""
    micro = switch_loss_micro(counts_FE, prob_FV, tokens_F)
    return micro - switch_loss_global(counts_FE, prob_FV, tokens_F, step_F)


@metric(
    group="losses",
    formula="mean over tokens of (ln sum exp z)^2",
    range="0 and up",
    unit="nats^2",
    source="ST-MoE (Zoph et al. 2022, arXiv 2202.08906)",
    null="(ln V)^2: all logits 0",
    chance=lambda outputs: Chance(float(np.log(outputs) ** 2)),
)
def z_loss(router_confidence: Answer) -> float | None:
    """Drift of the logits, which the balancing loss cannot see: softmax forgets a shift.

    Home: the stored question `router_confidence`.
    """
    return router_confidence["zloss"]


@metric(
    group="losses",
    formula="variance / mean^2 of n_i",
    range="0 to E/k - 1",
    source="Shazeer et al. 2017, arXiv 1701.06538 (there of a smooth estimate of the counts)",
    null="(1 - k/E) / mu",
    drawn=True,
)
def load_cv2(counts_E: Counts) -> Any:
    """Shazeer's load loss, on counts."""
    return cv2(counts_E)


def _equal_weights(counts_E: Counts, tokens: int, experts: int) -> Chance:
    mu = counts_E.sum() / experts
    return Chance(float((1 - mu / tokens) / mu))


@metric(
    group="losses",
    formula="variance / mean^2 of G_i, the sum of gate weights on expert i",
    range="0 to E - 1",
    source="Shazeer et al. 2017, arXiv 1701.06538",
    null="(1 - k/E) / mu with equal weights, more with unequal ones; shown is the first",
    chance=_equal_weights,
)
def importance_cv2(gate_E: Floats) -> Any:
    """Shazeer's importance loss: the gate-weighted load. It and load_cv2 can disagree."""
    return cv2(gate_E)


def _within_rounding(logits_TV: Floats, chosen_TV: Bools, ranking: bias.Ranking) -> Chance:
    near_T = bias.unsure(logits_TV, chosen_TV, ranking)
    return Chance(0.0, None, float(near_T.mean())) if len(near_T) else Chance(0.0)


@metric(
    group="losses",
    formula="share of tokens with topk(s + b) other than topk(s), group limits alike in both",
    range="0 to 1",
    source="loss-free balancing (Wang et al., arXiv 2408.15664)",
    null="between 0 and the share of tokens whose boundary is within the bfloat16 of recorded "
    "logits; shown is 0",
    chance=_within_rounding,
)
def bias_changed(ranking: bias.Ranking, logits_TV: Floats, chosen_TV: Bools) -> float:
    """What balance without a loss costs: tokens sent to experts that their router ranks lower."""
    changed_T = bias.changed(logits_TV, chosen_TV, ranking)
    return float(changed_T.mean()) if len(changed_T) else float("nan")


def _of_experts(prob_V: Floats, counts_E: Counts) -> Floats:
    """P of the experts that compute, which sums to 1 in the loss."""
    return prob_V[..., : np.shape(counts_E)[-1]]


def _by_sequence(values_TV: NDArray[Any], sequence_T: Ints) -> Floats:
    out = np.zeros((int(sequence_T.max()) + 1, values_TV.shape[1]))
    np.add.at(out, sequence_T, values_TV)
    return out


def _times(chance: Chance, k: int) -> Chance:
    high = None if chance.high is None else k * chance.high
    return Chance(k * chance.expected, None, high)
