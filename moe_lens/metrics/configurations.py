"""Configurations: which sets of k experts a router uses, of all those that it could.

Finer experts make more sets. How many are used is another matter: a router of a small hidden size
reaches few (a linear one of d = 2 and 16 experts, 8 of a token, some 20 of 12,870). Sampled tokens
see only part of what is used, and each number here says how it takes that: see `richness`.

Two things are called granularity: how much narrower an expert is than the dense layer that it
stands for, d_ff / d_expert (Krajewski et al. 2024), and how many experts a token uses, k
(Boix-Adsera and Rigollet 2025). `granularity` is the first; the second is k itself.

Legend: ... any leading axes (draws), N tokens, K choices, E experts, M how often a set was chosen.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from moe_lens.metrics import richness
from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import FORWARD_DRAWS, Chance, Ints
from moe_lens.metrics.subsets import largest_entropy, separate_entropy, shares_of

_UNSEEN = (
    "most tokens chose a set of experts that no other token chose (set_coverage below "
    f"{richness.ENOUGH}): the entropy would be that of the sample size"
)
UNDEFINED = {
    "set_entropy": _UNSEEN,
    "set_entropy_chao_shen": _UNSEEN,
    "independence_deficit": _UNSEEN,
    "effective_sets": "no two tokens chose the same set of experts",
}
"""Why a metric has no value, where what it reads is there."""

_set_metric = partial(
    metric,
    group="configurations",
    null=f"drawn, {FORWARD_DRAWS} times: all sets that the router can reach alike",
    drawn=True,
)


@metric(
    group="configurations",
    formula="log2 of the sets a token can choose: C(E, k), or those within the limit of groups",
    range="0 to log2 C(E, k)",
    unit="bits",
    source="Boix-Adsera and Rigollet 2025, The power of fine-grained experts",
    null="none: it is the router's configuration",
)
def reachable_bits(reachable_sets: int) -> float:
    """The room that a router has. A limit of groups costs some: DeepSeek-V3 2.5 of 48.5 bits."""
    return math.log2(reachable_sets)


@metric(
    group="configurations",
    formula="N / (T E), which is k / E",
    range="0 to 1",
    null="none: it is the router's configuration",
)
def sparsity(counts_E: Ints, tokens: int) -> float:
    """Share of a layer's experts that a token uses."""
    return float(np.sum(counts_E) / (tokens * len(counts_E))) if tokens else math.nan


@metric(
    group="configurations",
    formula="4 d_model / d_expert: d_ff of a dense layer is taken as 4 d_model",
    range="above 0",
    source="Krajewski et al. 2024, Scaling Laws for Fine-Grained Mixture of Experts",
    null="none: it is the model's configuration",
)
def granularity(widths: tuple[int, int]) -> float:
    """How many experts make the width of one dense layer. Not k, which others call so."""
    hidden, expert = widths
    return 4 * hidden / expert


@_set_metric(formula="D = #{different sets of chosen experts}", range="1 to tokens looked at")
def distinct_sets(sets_M: Ints) -> Any:
    """Configurations in use: few of them, and experts are bundles. Grows with the sample."""
    return richness.distinct(sets_M)


@_set_metric(formula="D / reachable sets", range="0 to 1", unit="of reachable sets")
def used_sets(sets_M: Ints, reachable_sets: int) -> Any:
    """How much of the router's room this sample shows; at most tokens / reachable sets."""
    return richness.distinct(sets_M) * 2.0 ** -math.log2(reachable_sets)


@_set_metric(formula="f1 = #{sets chosen by one token}", range="0 to D")
def singleton_sets(sets_M: Ints) -> Any:
    """Sets that no other token chose: what the sample has hardly seen."""
    return sets_M[..., 1]


@_set_metric(formula="1 - f1 / n", range="0 to 1", source="Good 1953, Biometrika 40, 237")
def set_coverage(sets_M: Ints) -> Any:
    """Probability that the next token's set is a known one: how far a sample can be trusted."""
    return richness.coverage(sets_M)


@_set_metric(
    formula="D + f1 (f1 - 1) / (2 (f2 + 1))",
    range="D or more",
    source="Chao 1984, Scandinavian Journal of Statistics 11, 265",
)
def chao1_sets(sets_M: Ints) -> Any:
    """Sets that are in use at least, those included that no sampled token chose."""
    return richness.chao1(sets_M)


@_set_metric(
    formula=f"-sum q log2 q of sets in the sample; none at a coverage below {richness.ENOUGH}",
    range="0 to log2 min(n, reachable sets)",
    unit="bits",
)
def set_entropy(sets_M: Ints) -> Any:
    """Bits that say which set a token uses: beside reachable_bits, how evenly the room is used."""
    return richness.trusted(richness.entropy(sets_M), sets_M)


@_set_metric(
    formula=f"the entropy with what was not seen; none at a coverage below {richness.ENOUGH}",
    range="0 or more",
    unit="bits",
    source="Chao and Shen 2003, Environmental and Ecological Statistics 10, 429",
)
def set_entropy_chao_shen(sets_M: Ints) -> Any:
    """The same where the sample is small: the plain entropy is then too low."""
    return richness.trusted(richness.chao_shen(sets_M), sets_M)


def _effective_by_chance(set_draws_RM: Ints, reachable_sets: int) -> Chance:
    drawn_R = richness.effective(set_draws_RM)
    # A mean would be of those draws alone in which two tokens have the same set.
    expected = float(np.exp2(min(math.log2(reachable_sets), 1000)))  # a float holds no more
    return Chance(expected, float(drawn_R.min()), float(drawn_R.max()))


@metric(
    group="configurations",
    formula="1 / (sum c (c - 1) / n (n - 1)), c tokens of a set: without bias in the sum",
    range="1 or more",
    source="Simpson 1949, Nature 163, 688; Renyi's entropy of order 2",
    null=f"the reachable sets, all alike; drawn, {FORWARD_DRAWS} times",
    chance=_effective_by_chance,
)
def effective_sets(sets_M: Ints) -> float:
    """As many sets, used evenly, would meet as often.

    Its log2 is a lower bound of the entropy in bits, and stands at any coverage.
    """
    value = float(richness.effective(sets_M))
    return value if math.isfinite(value) else math.nan


def _deficit_by_chance(ids_NK: Ints, experts: int) -> Chance:
    sizes = np.unique((ids_NK >= 0).sum(1))
    if len(sizes) != 1:
        return Chance(math.nan)
    share_E = shares_of(ids_NK, experts)
    return Chance(separate_entropy(share_E) - largest_entropy(share_E, int(sizes[0])))


@metric(
    group="configurations",
    formula="sum h(F_i) - H, h the entropy of a coin, H that of sets (Chao, Wang, Jost 2013)",
    range="0 or more; an estimate can be a little below",
    unit="bits",
    null="that of the most random router with these F_i and this k (conditional Bernoulli; no "
    "limit of groups): k choices of a token are never independent",
    chance=_deficit_by_chance,
)
def independence_deficit(sets_M: Ints, ids_NK: Ints, experts: int) -> float:
    """Total correlation: what is known of a token's experts because they are chosen together.

    Above chance experts come in bundles; the counts of single experts do not show it.
    """
    deficit = separate_entropy(shares_of(ids_NK, experts)) - richness.chao_wang_jost(sets_M)
    return float(richness.trusted(deficit, sets_M))
