"""Locality: how far a token's experts are those of the tokens before it in its sequence.

Loads alone repeat experts, a hot one most of all, so the null is the layer's own tokens in another
order (`sequences`); a uniform router repeats fewer (`uniform`). What is beyond the null are topics,
and whatever else the tokens of a sequence have in common: a domain with experts of its own shows.

Legend: N tokens, K choices of a token, E experts, S sequences, P pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import FORWARD_DRAWS, SEED, Chance, Ints, of_draws
from moe_lens.metrics.sequences import LONG, PREFIX, SHORT, Sequences, ratio

_MIXTRAL = "Mixtral (Jiang et al., arXiv 2401.04088), table 5"
_DENNING = "Denning, The working set model for program behavior (CACM 11, 1968)"
_ANEW = f"drawn {FORWARD_DRAWS} times: the layer's tokens in another order"

_ALONE = "no two tokens at positions that follow each other"
_SHORT = f"fewer than two sequences of {2 * PREFIX} tokens, or 2 k experts are all of them"
UNDEFINED = {
    **dict.fromkeys(("repeated_first", "repeated_any", "overlap", "overlap_jaccard"), _ALONE),
    **{f"working_set_{w}": f"no {w} tokens in a row in one sequence" for w in (SHORT, LONG)},
    **dict.fromkeys(("prefix_recall", "prefix_gain"), _SHORT),
}
"""Why a metric has no value, where what it reads is there."""


def uniform(experts: int, top_k: int) -> dict[str, float]:
    """What a router that draws k of E uniformly gives, in closed form, by the metric's name."""
    sets = comb(experts, top_k)
    shared = [
        comb(top_k, h) * comb(experts - top_k, top_k - h) / sets for h in range(top_k + 1)
    ]  # P(two tokens share h experts)
    return {
        "repeated_first": 1 / experts,
        "repeated_any": 1 - shared[0],
        "overlap": top_k / experts,
        "overlap_jaccard": sum(p * h / (2 * top_k - h) for h, p in enumerate(shared)),
    }


def overlap_by_lag(
    sequences: Sequences, lags: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)
) -> pd.DataFrame:
    """`overlap` of tokens that stand further apart: how fast a sequence forgets its experts.

    Args:
        sequences: Of one layer.
        lags: Positions, each 1 or more.

    Returns:
        A row a lag at which there are tokens: `lag`, `pairs`, `overlap` (0 to 1), `chance` (of the
        layer's tokens in any order).
    """
    sets_WN, by_chance = sequences.sets_WN, repeated(sequences.counts_E, len(sequences))
    rows = []
    for lag in lags:
        earlier_P, later_P = sequences.follow(lag)
        shared = np.bitwise_count(sets_WN[:, earlier_P] & sets_WN[:, later_P]).sum()
        found = ratio(shared, np.bitwise_count(sets_WN[:, later_P]).sum())
        rows.append((lag, len(earlier_P), found, by_chance))
    out = pd.DataFrame(rows, columns=["lag", "pairs", "overlap", "chance"])
    return out[out["pairs"] > 0].reset_index(drop=True)


def repeated(counts_E: Ints, tokens: int) -> float:
    """P(a choice is also one of another token's), both drawn from these: sum F_i^2 / sum F_i.

    But that no token meets itself.
    """
    return ratio((counts_E * (counts_E - 1)).sum(), counts_E.sum() * (tokens - 1))


def touched(counts_E: Ints, tokens: int, window: int) -> float:
    """Experts that so many of these tokens touch, drawn without replacement.

    Sum over experts of 1 - C(N - n_i, tau) / C(N, tau); for equal loads and many tokens this is
    `working_set.by_chance`.
    """
    drawn = np.arange(min(window, tokens))
    left = np.maximum(tokens - counts_E[:, None] - drawn, 0) / (tokens - drawn)
    return float((1 - left.prod(1)).sum())


def _around(expected: float, draws: ArrayLike) -> Chance:
    """A closed form, and what draws span."""
    found = of_draws(draws)
    return Chance(expected, found.low, found.high)


def _first_by_chance(ranked_sequences: Sequences) -> Chance:
    first_N = ranked_sequences.ids_NK[:, 0]
    n_E = np.bincount(first_N[first_N >= 0])
    return _around(repeated(n_E, int(n_E.sum())), ranked_sequences.drawn["repeated_first"])


def _overlap_by_chance(sequences: Sequences) -> Chance:
    expected = repeated(sequences.counts_E, len(sequences))
    return _around(expected, sequences.drawn["overlap"])


def _touched_by_chance(window: int) -> Callable[[Sequences], Chance]:
    def chance(sequences: Sequences) -> Chance:
        expected = touched(sequences.counts_E, len(sequences), window)
        return _around(expected, sequences.drawn[f"working_set_{window}"])

    return chance


def _prefixes_by_chance(sequences: Sequences) -> Chance:
    hits_SS, _, total = sequences.halves
    size = len(hits_SS)
    rng = np.random.default_rng(SEED)
    draws = [
        ratio(hits_SS[rng.permutation(size), np.arange(size)].sum(), total)
        for _ in range(FORWARD_DRAWS)
    ]
    return _around(ratio(hits_SS.sum() / size, total), draws)


def _gain_by_chance(sequences: Sequences) -> Chance:
    null, less = _prefixes_by_chance(sequences), _popular(sequences)
    return _around(null.expected - less, [x - less for x in (null.low, null.high) if x is not None])


def _popular(sequences: Sequences) -> float:
    _, popular_S, total = sequences.halves
    return ratio(popular_S.sum(), total)


@metric(
    group="locality",
    formula="P(e1(t) = e1(t + 1)), e1 the expert with the largest gate weight",
    range="0 to 1",
    source=f"{_MIXTRAL}, first choice",
    null=f"{_ANEW}; expected: the sum of squared shares of first choices. A uniform router: 1/E",
    chance=_first_by_chance,
)
def repeated_first(ranked_sequences: Sequences) -> float:
    """How often a token's first choice is that of the token before it."""
    return ranked_sequences.found["repeated_first"]


@metric(
    group="locality",
    formula="P(S(t) and S(t + 1) have an expert in common)",
    range="0 to 1",
    source=f"{_MIXTRAL}, first or second choice",
    null=f"{_ANEW}. A uniform router: 1 - C(E - k, k) / C(E, k)",
    chance=lambda sequences: of_draws(sequences.drawn["repeated_any"]),
)
def repeated_any(sequences: Sequences) -> float:
    """How often a token finds an expert of its own in use; near 1 by chance where k^2 > E."""
    return sequences.found["repeated_any"]


@metric(
    group="locality",
    formula="sum of |S(t) ∩ S(t + 1)| / sum of |S(t + 1)|",
    range="0 to 1",
    null=f"{_ANEW}; expected: sum F_i^2 / k. A uniform router: k/E",
    chance=_overlap_by_chance,
)
def overlap(sequences: Sequences) -> float:
    """The hit rate of a cache that holds the last token's experts and no more.

    Home: the stored question `repetition` has it of a whole trace.
    """
    return sequences.found["overlap"]


@metric(
    group="locality",
    formula="mean of |S(t) ∩ S(t + 1)| / |S(t) ∪ S(t + 1)|",
    range="0 to 1",
    null=f"{_ANEW}. A uniform router with 8 of 64: 0.0705, 8 of 128: 0.0343, 8 of 256: 0.0169",
    chance=lambda sequences: of_draws(sequences.drawn["overlap_jaccard"]),
)
def overlap_jaccard(sequences: Sequences) -> float:
    """The same as similarity of the two sets: 1/3 where they share half."""
    return sequences.found["overlap_jaccard"]


@metric(
    group="locality",
    formula=f"mean over windows of {SHORT} tokens in a row of |S(t) ∪ … ∪ S(t + {SHORT - 1})|",
    range="k to E",
    unit="experts",
    source=_DENNING,
    null=f"{_ANEW}; expected: sum of 1 - C(T - n_i, {SHORT}) / C(T, {SHORT}). A uniform router: "
    f"E (1 - (1 - k/E)^{SHORT})",
    chance=_touched_by_chance(SHORT),
)
def working_set_4(sequences: Sequences) -> float:
    """Experts that a few tokens of one sequence need; low: they share them."""
    return sequences.found["working_set_4"]


@metric(
    group="locality",
    formula=f"mean over windows of {LONG} tokens in a row of |S(t) ∪ … ∪ S(t + {LONG - 1})|",
    range="k to E",
    unit="experts",
    source=_DENNING,
    null=f"{_ANEW}; expected: sum of 1 - C(T - n_i, {LONG}) / C(T, {LONG}). A uniform router: "
    f"E (1 - (1 - k/E)^{LONG})",
    chance=_touched_by_chance(LONG),
)
def working_set_32(sequences: Sequences) -> float:
    """Experts that a sentence or two need: what a cache would have to hold."""
    return sequences.found["working_set_32"]


@metric(
    group="locality",
    formula="share of the choices in a sequence's second half that are among the 2 k experts its "
    "first half chose most",
    range="0 to 1",
    null=f"drawn {FORWARD_DRAWS} times: first halves of other sequences. A uniform router: 2 k / E",
    chance=_prefixes_by_chance,
)
def prefix_recall(sequences: Sequences) -> float:
    """How far the beginning of a sequence says which experts the rest of it needs.

    Of sequences with 16 kept tokens or more.
    """
    hits_SS, _, total = sequences.halves
    if len(hits_SS) < 2 or 2 * sequences.ids_NK.shape[1] >= sequences.experts:
        return float("nan")
    return ratio(np.trace(hits_SS), total)


@metric(
    group="locality",
    formula="prefix_recall less the recall of the 2 k experts chosen most in the other sequences' "
    "first halves",
    range="-1 to 1",
    null="as prefix_recall. Below 0: few tokens of its own say less than many of others",
    chance=_gain_by_chance,
)
def prefix_gain(sequences: Sequences) -> float:
    """What experts fetched for a sequence hit beyond those fetched for everybody.

    Below 0 that does not pay, however far the recall is beyond chance.
    """
    own: float = prefix_recall(sequences)
    return own - _popular(sequences)
