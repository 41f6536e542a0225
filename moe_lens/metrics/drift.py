"""Whether the routing of two stretches of traffic differs, and where in a run it changed.

Distances of shares (f_i, sum 1), what sampling alone makes of them, and a search for the one point
at which a run of blocks changed. Tokens of real text are not independent: a block of tokens (a
forward, a sequence, some steps) is the unit here. `design_effect` says how many tokens are worth
one independent one, and `change_points` compares with the same blocks in another order.

Legend: ... any leading axes, E experts, C blocks of the run in order, L layers, D numbers of a
block, R orders of the blocks, S splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_lens.metrics.balance import Counts, shares
from moe_lens.metrics.chance import SEED, Floats

ORDERS = 999
"""Orders of the blocks that a change is compared with: beyond all of them is beyond 0.1 %."""
EDGE = 3
"""Blocks on either side of a change. Fewer can be put aside by too few orders to be rare."""


def jsd(p: ArrayLike, q: ArrayLike) -> Any:
    """Jensen-Shannon divergence over the last axis, nats: 0 to ln 2.

    (KL(p, m) + KL(q, m)) / 2, m = (p + q) / 2, which counts both sides alike, however many tokens
    each has.

    Args:
        p: Shares or counts; divided by their sum.
        q: The same.

    Returns:
        NaN where a side has nothing.
    """
    p_E, q_E = shares(np.asarray(p)), shares(np.asarray(q))
    m_E = (p_E + q_E) / 2
    return np.maximum(0.0, (_kl(p_E, m_E) + _kl(q_E, m_E)) / 2)


def jsd_floor(experts: int, n1: ArrayLike, n2: ArrayLike) -> Any:
    """What `jsd` is on average between two samples of one distribution.

    (E - 1) / 8 (1 / n1 + 1 / n2), the leading term. n are effective numbers of choices: choices of
    one token are not independent (they differ), which makes it up to 1 - k/E of that.
    """
    return (experts - 1) / 8 * (1 / np.asarray(n1, float) + 1 / np.asarray(n2, float))


def psi(p: ArrayLike, q: ArrayLike) -> Any:
    """Population stability index, sum (p - q) ln(p / q) over the last axis; 0 and up.

    An expert that one side never chose has half a choice there, if these are counts, so that the
    logarithm is a number; shares are taken as they are, and give infinity.
    """
    p_E, q_E = np.asarray(p, float), np.asarray(q, float)
    if min(p_E.sum(-1).min(initial=2), q_E.sum(-1).min(initial=2)) > 1.5:  # counts
        p_E, q_E = np.maximum(p_E, 0.5), np.maximum(q_E, 0.5)
    p_E, q_E = shares(p_E), shares(q_E)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p_E == q_E, 0.0, (p_E - q_E) * (np.log(p_E) - np.log(q_E))).sum(-1)


def psi_floor(experts: int, n1: ArrayLike, n2: ArrayLike) -> Any:
    """What `psi` is on average between two samples of one distribution: 8 times `jsd_floor`.

    0.121 at E = 64 and 1,000 choices each: above 0.1, which is often called a change.
    """
    return 8 * jsd_floor(experts, n1, n2)


def total_variation(p: ArrayLike, q: ArrayLike) -> Any:
    """Half the sum of |p - q| over the last axis: the share of choices that moved; 0 to 1."""
    return np.abs(shares(np.asarray(p)) - shares(np.asarray(q))).sum(-1) / 2


def chi_square(a_E: Counts, b_E: Counts) -> Any:
    """Pearson's statistic of two rows of counts; on average about E - 1 if tokens are independent.

    Experts that neither chose do not count.
    """
    return _of_table(a_E, b_E, lambda seen, due: (seen - due) ** 2 / due)


def g_test(a_E: Counts, b_E: Counts) -> Any:
    """2 sum n ln(n / expected): the likelihood ratio of the same comparison."""
    return _of_table(
        a_E, b_E, lambda seen, due: 2 * seen * np.log(np.where(seen > 0, seen / due, 1.0))
    )


def design_effect(counts_CE: Counts, tokens_C: ArrayLike) -> float:
    """How many tokens are worth one independent token: variance between blocks over binomial.

    Pooled over experts: sum over blocks of T_c (F_c - F)^2 / (C - 1), over F (1 - F). Tokens of a
    document choose alike, so that blocks differ by more than their tokens would. At least 1; a
    drift counts as unlikeness too, which errs on the side of silence.

    Args:
        counts_CE: Tokens that chose each expert.
        tokens_C: Tokens of each block; those without any do not count.

    Returns:
        NaN of fewer than two blocks.
    """
    tokens_C = np.asarray(tokens_C, float)
    counts_CE, tokens_C = np.asarray(counts_CE)[tokens_C > 0], tokens_C[tokens_C > 0]
    if len(tokens_C) < 2:
        return float("nan")
    share_E = counts_CE.sum(0) / tokens_C.sum()
    expected = float((share_E * (1 - share_E)).sum())
    if expected <= 0:
        return 1.0
    off_CE = counts_CE / tokens_C[:, None] - share_E
    between = float((tokens_C[:, None] * off_CE**2).sum()) / (len(tokens_C) - 1)
    return max(1.0, between / expected)


@dataclass(frozen=True)
class Change:
    """The split of a layer's blocks at which the two sides differ most.

    Attributes:
        at: First block after it.
        p: Probability that some layer of those compared shows as large a difference, were the
            order of the blocks of no importance.
    """

    at: int
    p: float


def change_points(
    blocks: Sequence[tuple[Floats, Floats]], at: int | None = None, draws: int = ORDERS
) -> list[Change]:
    """Where each layer changed most, and how rare that is among orders of the same blocks.

    All layers are put into the same orders, and compared with the largest of their statistics
    (Westfall and Young 1993): p holds for all layers together, however alike these are. Each
    layer's statistic is divided by its mean over the orders, so that layers of unlike noise count
    alike. Blocks have to be exchangeable while nothing changes: those of the same sequences have
    to be one block.

    Args:
        blocks: Of each layer, deviations `[C, D]` whose sum is 0 (`of_counts`, `of_means`), and
            weights `[C]`. C is the same of all, and at least 2 `EDGE`.
        at: Only this split, as between two runs put one behind the other; None: the best of all.
        draws: How many orders.
    """
    if not blocks:
        return []
    C = len(blocks[0][1])
    split_S = np.arange(EDGE, C - EDGE + 1) if at is None else np.array([at])
    place_RC = np.tile(np.arange(C), (draws + 1, 1))
    place_RC[1:] = np.random.default_rng(SEED).permuted(place_RC[1:], axis=1)
    before_RSC = (place_RC[:, None, :] < split_S[:, None]).astype(float)
    found_LRS = np.stack([_splits(x_CD, weight_C, before_RSC) for x_CD, weight_C in blocks])
    best_LR = found_LRS.max(2)
    mean_L1 = best_LR.mean(1, keepdims=True)
    scaled_LR = np.divide(best_LR, mean_L1, out=np.zeros_like(best_LR), where=mean_L1 > 0)
    # The order as recorded is one of them, the first; a hair's breadth is arithmetic.
    p_L = (scaled_LR.max(0) >= scaled_LR[:, :1] * (1 - 1e-9)).mean(1)
    at_L = split_S[found_LRS[:, 0].argmax(1)]
    return [Change(int(at), float(p)) for at, p in zip(at_L, p_L, strict=True)]


def of_counts(counts_CE: Counts) -> tuple[Floats, Floats]:
    """Blocks of counts for `change_points`: (n - N f) / sqrt(f), f of all together.

    The statistic of a split is then Pearson's chi-square of its two sides.
    """
    counts = np.asarray(counts_CE, float)
    total_C, share_E = counts.sum(1), counts.sum(0) / max(counts.sum(), 1)
    kept = share_E > 0
    return (counts - total_C[:, None] * share_E)[:, kept] / np.sqrt(share_E[kept]), total_C


def of_means(mean_C: Floats, weight_C: ArrayLike) -> tuple[Floats, Floats]:
    """Blocks of one mean each for `change_points`; a block whose mean is NaN has no weight."""
    known_C = np.isfinite(mean_C)
    weight_C = np.where(known_C, np.asarray(weight_C, float), 0.0)
    mean_C = np.where(known_C, mean_C, 0.0)
    overall = (mean_C * weight_C).sum() / max(weight_C.sum(), 1e-300)
    return ((mean_C - overall) * weight_C)[:, None], weight_C


def _splits(x_CD: Floats, weight_C: Floats, before_RSC: Floats) -> Floats:
    """`[R, S]`: |sum of x before|^2 (1 / weight before + 1 / weight after)."""
    # The square of a sum is the sum of all products: those of two blocks are taken once.
    square_RS = ((before_RSC @ (x_CD @ x_CD.T)) * before_RSC).sum(-1)
    before_RS = before_RSC @ weight_C
    after_RS = weight_C.sum() - before_RS
    both_RS = (before_RS > 0) & (after_RS > 0)
    inverse_RS = np.zeros_like(before_RS)
    np.divide(weight_C.sum(), before_RS * after_RS, out=inverse_RS, where=both_RS)
    return np.asarray(np.maximum(square_RS, 0) * inverse_RS)


def _kl(p_E: Floats, m_E: Floats) -> Any:
    return (p_E * np.log(np.where(p_E > 0, p_E, 1.0) / np.where(p_E > 0, m_E, 1.0))).sum(-1)


def _of_table(a_E: Counts, b_E: Counts, term: Any) -> Any:
    seen_2E: NDArray[np.float64] = np.stack([np.asarray(a_E, float), np.asarray(b_E, float)], -2)
    total = seen_2E.sum((-1, -2), keepdims=True)
    due_2E = seen_2E.sum(-1, keepdims=True) * seen_2E.sum(-2, keepdims=True) / total
    return np.where(due_2E > 0, term(seen_2E, np.where(due_2E > 0, due_2E, 1.0)), 0.0).sum((-1, -2))
