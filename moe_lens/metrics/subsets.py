"""Sets of k experts that a router can choose, and what equal use of them would show.

A router that chooses among `groups` equal groups first, and then in the best `top_groups` of them
(DeepSeek-V2, V3), reaches only sets that lie within as many groups.

Legend: N tokens, K choices, E experts, R draws, M how often a set was chosen, G groups used.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from moe_lens.metrics.chance import FORWARD_DRAWS, SEED, Floats, Ints
from moe_lens.metrics.richness import stacked, tally

_MOST = 2**62
"""Cells that draws distinguish: of more, no two tokens of a sample would share one anyway."""


def reachable(experts: int, top_k: int, groups: int = 1, top_groups: int = 1) -> int:
    """How many sets of k experts a token can choose, exactly.

    Args:
        experts: E.
        top_k: k.
        groups: Equal groups of experts; 1: no limit.
        top_groups: How many of them a token's experts may come from.

    Raises:
        ValueError: Groups that do not divide the experts, or more choices than experts.
    """
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"groups divide the {experts} experts into equal parts, of which a token uses 1 to "
            f"all; got {groups} groups, {top_groups} of a token"
        )
    if not 0 <= top_k <= experts:
        raise ValueError(f"a token chooses 0 to {experts} different experts; got {top_k}")
    size = experts // groups
    return sum(math.comb(groups, j) * _in_all(size, top_k, j) for j in range(top_groups + 1))


def by_groups(experts: int, top_k: int, groups: int) -> Floats:
    """`[G + 1]`: share of all sets of k experts that lie in exactly j groups, j from 0."""
    every = math.comb(experts, top_k)
    size = experts // groups
    return np.array([math.comb(groups, j) * _in_all(size, top_k, j) / every
                     for j in range(groups + 1)])  # fmt: skip


def _in_all(size: int, top_k: int, groups: int) -> int:
    """Sets of k experts with at least one in each of these groups: inclusion and exclusion."""
    return sum(
        (-1) ** empty * math.comb(groups, empty) * math.comb((groups - empty) * size, top_k)
        for empty in range(groups + 1)
    )


def chosen_sets(ids_NK: Ints) -> Ints:
    """`[M]`: how many different sets were chosen by m tokens, whatever the order of choices."""
    return tally(np.sort(ids_NK, axis=1))


@lru_cache(maxsize=8)
def set_draws(tokens: int, sets: int) -> Ints:
    """`[R, M]`: the same of a router to which all sets are alike."""
    rng = np.random.default_rng(SEED)
    drawn = (rng.integers(0, min(sets, _MOST), tokens) for _ in range(FORWARD_DRAWS))
    draws_RM = stacked([tally(keys_N) for keys_N in drawn])
    draws_RM.flags.writeable = False
    return draws_RM


def shares_of(ids_NK: Ints, experts: int) -> Floats:
    """`[E]`: F_i, share of the tokens that chose the expert."""
    counts_E = np.bincount(ids_NK[ids_NK >= 0], minlength=experts)
    return np.asarray(counts_E / max(len(ids_NK), 1), float)


def separate_entropy(share_E: Floats) -> float:
    """Bits of experts that are each chosen by a coin of their own: sum h(F_i)."""
    p = share_E[(share_E > 0) & (share_E < 1)]
    return float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum())


def largest_entropy(share_E: Floats, top_k: int) -> float:
    """The largest entropy of sets of k experts with these shares, bits.

    That of the conditional Bernoulli distribution, P(S) ~ product of w_i over S: the weights are
    found by w_i <- w_i F_i / P(i in S) (Chen, Dempster and Liu 1994, Biometrika 81, 457).

    Args:
        share_E: F_i, 0 to 1; they sum to k.
        top_k: k.

    Raises:
        ValueError: They do not.
    """
    if not math.isclose(share_E.sum(), top_k, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(f"shares of {top_k} choices sum to {top_k}; got {share_E.sum():.6g}")
    # An expert that all choose, or none, leaves nothing open.
    open_E = share_E[(share_E > 1e-12) & (share_E < 1 - 1e-12)]
    k = round(open_E.sum())
    if not len(open_E):
        return 0.0
    odds_E = open_E / (1 - open_E)
    for _ in range(1000):
        p_E = odds_E / (1 + odds_E)
        of_k, inside_E = _inclusion(p_E, k)
        if np.abs(inside_E - open_E).max() < 1e-6:
            break
        odds_E = odds_E * open_E / inside_E
    # Mean of -log P(S) = log P(k of them) - sum log(1 - p_i) - sum over S of log w_i. Its least
    # value over all weights is wanted, so that what is left of an error comes in squared.
    nats = np.log(of_k) - np.log1p(-p_E).sum() - (open_E * np.log(odds_E)).sum()
    return float(nats / math.log(2))


def _inclusion(p_E: Floats, k: int) -> tuple[float, Floats]:
    """Of coins p_i: P(k fall), and P(i fell | k fell). All in 0 to 1, so nothing overflows."""
    before = _fallen(p_E, k)
    after = _fallen(p_E[::-1], k)[::-1]
    of_k = float(before[-1, k])
    # k - 1 of the others: j before i, k - 1 - j after it.
    others_E = (before[:-1, :k] * after[1:, :k][:, ::-1]).sum(1)
    return of_k, p_E * others_E / of_k


def _fallen(p_E: Floats, k: int) -> Floats:
    """`[E + 1, k + 1]`: probability that j of the first i coins fell."""
    out = np.zeros((len(p_E) + 1, k + 1))
    out[0, 0] = 1
    for i, p in enumerate(p_E):
        out[i + 1] = out[i] * (1 - p)
        out[i + 1, 1:] += out[i, :-1] * p
    return out
