"""Co-activation: which experts of a layer tokens choose together, and bundles of such experts.

What loads alone make of it is told apart (`pairs`): where two experts are hot, many tokens choose
both. The stored question `co_activation` has the shares and lifts of a whole trace.

Legend: N tokens, K choices of a token, E experts, P unordered pairs of them, ... leading axes.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Chance, Floats, Ints, of_draws
from moe_lens.metrics.pairs import Pairs, pair_counts

_OLMOE = "OLMoE (Muennighoff et al., arXiv 2409.02060), eq. 6"
FEWEST = 30
"""Tokens that an expert needs before its share of them says something."""
EXPECTED = 5
"""Tokens that a pair needs by chance before its lift does."""

UNDEFINED = {
    "co_activation_max": f"no two experts were chosen together, or none by {FEWEST} tokens",
    "co_activation_lift_max": f"no two experts were chosen together, or none with {EXPECTED} such "
    "tokens by chance",
    "co_activation_excess": "no two experts were chosen together",
}
"""Why a metric has no value, where what it reads is there."""


def co_activation(
    ids_NK: Ints, experts: int, mode: Literal["paper", "release"] = "paper"
) -> Floats:
    """`[E, E]`: N_ij / N_i, the share of an expert's tokens that chose the other one too.

    A uniform router has (k - 1) / (E - 1) everywhere. OLMoE's released script counts neighbours in
    the order of the weights only, not all pairs, and has 2 (k - 1) / k / (E - 1): k/2 times less.

    Args:
        ids_NK: Choices, the largest gate weight first; -1: a token chose fewer.
        experts: E.
        mode: All pairs of a token's experts, or neighbours only, as the released script.

    Returns:
        0 to 1. NaN on the diagonal, and in the rows of experts that nobody chose.

    Raises:
        ValueError: Another mode.
    """
    together_EE = pair_counts(ids_NK, experts)
    chosen_E = np.diag(together_EE)
    if mode == "release":
        beside = [ids_NK[:, at : at + 2] for at in range(ids_NK.shape[1] - 1)]
        together_EE = pair_counts(np.concatenate([*beside, np.empty((0, 2), np.int64)]), experts)
    elif mode != "paper":
        raise ValueError(f"mode is paper or release; got {mode!r}")
    share_EE = np.full((experts, experts), np.nan)
    np.divide(together_EE, chosen_E[:, None], out=share_EE, where=chosen_E[:, None] > 0)
    np.fill_diagonal(share_EE, np.nan)
    return share_EE


def associations(ids_NK: Ints, experts: int) -> pd.DataFrame:
    """How each two experts of a layer go together.

    Args:
        ids_NK: Choices; -1: a token chose fewer.
        experts: E.

    Returns:
        A row a pair of experts that were both chosen, `expert` < `other`: `together` (N_ij, tokens
        that chose both), `lift` (N_ij N / (n_i n_j), 1: independent; a uniform router has
        (k - 1) E / (k (E - 1))), `pmi` (its logarithm; -inf: never together), `phi` (-1 to 1,
        correlation of the two choices), `jaccard` (0 to 1, of those that chose either),
        `expected` (N_ij of tokens that know nothing but the experts' loads), and `z` (how many
        standard deviations N_ij is from that; NaN: the loads leave it no room).
    """
    pairs = Pairs(ids_NK, experts)
    i_P, j_P = pairs.places_P
    n_E, together_P = pairs.chosen_E.astype(float), pairs.together_P.astype(float)
    a_P, b_P, tokens = n_E[i_P], n_E[j_P], pairs.tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_P = together_P * tokens / (a_P * b_P)
        spread_P = np.sqrt(a_P * (tokens - a_P) * b_P * (tokens - b_P))
        columns: dict[str, Any] = {
            "expert": i_P, "other": j_P, "together": pairs.together_P, "lift": lift_P,
            "pmi": np.log(lift_P), "phi": (tokens * together_P - a_P * b_P) / spread_P,
            "jaccard": together_P / (a_P + b_P - together_P),
            "expected": pairs.expected_EE[i_P, j_P], "z": pairs.z_EE[i_P, j_P],
        }  # fmt: skip
    return pd.DataFrame(columns)[(a_P > 0) & (b_P > 0)].reset_index(drop=True)


def bundles(ids_NK: Ints, experts: int, lift: float = 2.0) -> list[tuple[int, ...]]:
    """Groups of experts that are tied by pairs chosen together far more often than loads make.

    Candidates for one device, or for merging. Two experts are tied if they are together at least
    `lift` times as often as expected, and further from that than the furthest pair of any draw of
    the null; a bundle is what such ties connect.

    Args:
        ids_NK: Choices; -1: a token chose fewer.
        experts: E.
        lift: Of the expected number, at least; of pairs that are expected 5 times or more.

    Returns:
        Of two experts and more, ascending; the largest bundle first.
    """
    pairs = Pairs(ids_NK, experts)
    i_P, j_P = pairs.places_P
    expected_P, sd_P = (x[i_P, j_P] for x in (pairs.expected_EE, np.sqrt(pairs.variance_EE)))
    asked_P = (expected_P >= EXPECTED) & (sd_P > 0)
    if not asked_P.any():
        return []
    far_RP = (pairs.draws_RP - expected_P)[:, asked_P] / sd_P[asked_P]
    together_P = pairs.together_P
    tied_P = asked_P & (together_P >= lift * expected_P)
    tied_P &= together_P - expected_P > far_RP.max() * sd_P
    bundle_E = np.arange(experts)
    for i, j in zip(i_P[tied_P], j_P[tied_P], strict=True):
        bundle_E[bundle_E == bundle_E[j]] = bundle_E[i]
    found = [tuple(np.flatnonzero(bundle_E == b).tolist()) for b in np.unique(bundle_E)]
    return sorted((b for b in found if len(b) > 1), key=lambda b: (-len(b), b))


def largest_share(together_P: ArrayLike, pairs: Pairs) -> Any:
    """The largest N_ij / N_i of experts with enough tokens; NaN: there is none."""
    ends_2P = np.sort(pairs.chosen_E[np.stack(pairs.places_P)], axis=0)
    of_P = np.where(ends_2P[0] >= FEWEST, ends_2P[0], ends_2P[1])
    return _largest(together_P, of_P, of_P >= FEWEST)


def largest_lift(together_P: ArrayLike, pairs: Pairs) -> Any:
    """The largest N_ij N / (n_i n_j) of pairs with enough tokens; NaN: there is none."""
    n_2P = pairs.chosen_E[np.stack(pairs.places_P)].astype(float)
    by_chance_P = n_2P[0] * n_2P[1] / max(pairs.tokens, 1)
    return _largest(together_P, by_chance_P, by_chance_P >= EXPECTED)


def elsewhere(together_P: ArrayLike, pairs: Pairs) -> Any:
    """1/2 sum |N_ij - expected| / sum N_ij; NaN: there are no pairs."""
    i_P, j_P = pairs.places_P
    total = pairs.together_P.sum()
    if total == 0:
        return np.full(np.shape(together_P)[:-1], np.nan)
    far_P = np.abs(np.asarray(together_P) - pairs.expected_EE[i_P, j_P])
    return far_P.sum(-1) / (2 * total)


def _largest(together_P: ArrayLike, of_P: NDArray[Any], asked_P: NDArray[np.bool_]) -> Any:
    together = np.asarray(together_P)[..., asked_P]
    if not (asked_P.any() and together.any()):
        return np.full(together.shape[:-1], np.nan)
    return (together / of_P[asked_P]).max(-1)


def _null(statistic: Any) -> Any:
    def chance(pairs: Pairs) -> Chance:
        return of_draws(statistic(pairs.draws_RP, pairs))

    return chance


_SAME_LOADS = "drawn 199 times: each expert is chosen as often, each token chooses as many"


@metric(
    group="coactivation",
    formula=f"max N_ij / N_i, N_ij tokens that chose both; experts of {FEWEST} tokens or more",
    range="0 to 1",
    source=_OLMOE,
    null=f"{_SAME_LOADS}; with equal loads each pair has (k - 1) / (E - 1)",
    chance=_null(largest_share),
)
def co_activation_max(pairs: Pairs) -> Any:
    """How far one expert follows another; near 1 beyond chance: one of them could be spared.

    A hot expert follows all others.

    Home: the stored question `co_activation` has every pair of a trace.
    """
    return largest_share(pairs.together_P, pairs)


@metric(
    group="coactivation",
    formula=f"max N_ij T / (n_i n_j), of pairs with n_i n_j / T of {EXPECTED} or more",
    range="0 and up",
    null=f"{_SAME_LOADS}; with equal loads each pair has (k - 1) E / (k (E - 1))",
    chance=_null(largest_lift),
)
def co_activation_lift_max(pairs: Pairs) -> Any:
    """The strongest tie of two experts, however often they are chosen: one device for both."""
    return largest_lift(pairs.together_P, pairs)


@metric(
    group="coactivation",
    formula="1/2 sum |N_ij - m_ij| / sum N_ij, m_ij what the loads alone make of N_ij",
    range="0 to 1",
    null=_SAME_LOADS,
    chance=_null(elsewhere),
)
def co_activation_excess(pairs: Pairs) -> Any:
    """Share of all pairs that are elsewhere than loads put them: structure in the choices.

    Of experts with similar roles, or of tokens of different topics.
    """
    return elsewhere(pairs.together_P, pairs)
