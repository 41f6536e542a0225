"""How many different things there are, from a sample that has not seen them all.

Things are sets of experts, or paths through the layers. There may be far more of them than tokens;
then nearly every token brings a new one, and the plain entropy of the sample is that of the sample
size, log2 n, whatever the router does. Good-Turing's coverage says how far a sample can be trusted.

`times_M` is all that is needed: times_M[m] different things were seen by m tokens each. Leading
axes (draws of a null) pass through. NaN: nothing was seen, or too little for such a number.

Legend: ... any leading axes, N tokens, D parts of a key, M how often a thing was seen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe_lens.metrics.chance import Floats, Ints

ENOUGH = 0.5
"""Coverage below which an entropy is that of the sample."""


def tally(keys_ND: ArrayLike) -> Ints:
    """`[M]`, M >= 3: how many different rows occur m times; `[N]`: how many different numbers."""
    _, counts = np.unique(np.asarray(keys_ND), axis=0, return_counts=True)
    return np.bincount(counts, minlength=3).astype(np.int64)


def stacked(tallies: list[Ints]) -> Ints:
    """`[R, M]` of tallies that end at different numbers."""
    out_RM = np.zeros((len(tallies), max(map(len, tallies))), np.int64)
    for row_M, times_M in zip(out_RM, tallies, strict=True):
        row_M[: len(times_M)] = times_M
    return out_RM


def seen(times_M: Ints) -> Any:
    """n: how many tokens there are."""
    return times_M @ np.arange(times_M.shape[-1])


def distinct(times_M: Ints) -> Any:
    """D: how many different things were seen."""
    return times_M[..., 1:].sum(-1)


def coverage(times_M: Ints) -> Any:
    """1 - f1/n, Good 1953: probability that the next token brings nothing new."""
    return 1 - _over(times_M[..., 1], seen(times_M))


def chao1(times_M: Ints) -> Any:
    """D + f1 (f1 - 1) / (2 (f2 + 1)), Chao 1984: things there are at least, unseen ones too."""
    once, twice = times_M[..., 1], times_M[..., 2]
    return distinct(times_M) + once * (once - 1) / (2 * (twice + 1))


def entropy(times_M: Ints) -> Any:
    """-sum q log2 q of the shares q in the sample, bits: at most log2 n."""
    m_M = np.arange(times_M.shape[-1])
    n = seen(times_M)
    return np.log2(_positive(n)) - _over(times_M @ (m_M * np.log2(np.maximum(m_M, 1))), n)


def chao_shen(times_M: Ints) -> Any:
    """The entropy with what was not seen, bits: Chao and Shen 2003 (Horvitz-Thompson)."""
    n = _positive(seen(times_M))[..., None]
    once = np.minimum(times_M[..., 1], n[..., 0] - 1)  # their rule where all were seen once
    q_M = (1 - once / n[..., 0])[..., None] * np.arange(1, times_M.shape[-1]) / n
    q_M = np.minimum(q_M, 1)  # of m above n, which no thing has
    # 1 - (1 - q)^n: probability that a thing of this share is in the sample at all.
    with np.errstate(divide="ignore"):
        there_M = -np.expm1(n * np.log1p(-q_M))
    each_M = np.divide(-q_M * np.log2(q_M, where=q_M > 0, out=np.zeros_like(q_M)), there_M,
                       where=there_M > 0, out=np.zeros_like(q_M))  # fmt: skip
    return (times_M[..., 1:] * each_M).sum(-1)


def chao_wang_jost(times_M: Ints) -> float:
    """The entropy without the bias of what was seen, either, bits; of one sample, not of draws.

    Chao, Wang and Jost 2013, Methods in Ecology and Evolution 4, 1091. Where most was seen,
    `chao_shen` is nearly as low as the entropy of the sample; this is not.
    """
    n, (_, once, twice) = int(seen(times_M)), times_M[:3]
    if n < 2:
        return math.nan
    m_M = np.arange(1, len(times_M))
    j_N = np.arange(1, n)
    sums_N = np.append(0, (1 / j_N).cumsum())
    nats = (times_M[1:] * m_M / n * (sums_N[-1] - sums_N[m_M - 1])).sum()
    some = 2 * twice if twice else 2 if once > 1 else 0  # their rule where nothing was seen twice
    a = some / (some + (n - 1) * (once if twice else once - 1)) if some else 1
    if once and a < 1:
        rest = -math.log(a) - ((1 - a) ** j_N / j_N).sum()
        nats += once / n * (1 - a) ** (1 - n) * rest
    return float(nats / math.log(2))


def collision(times_M: Ints) -> Any:
    """Probability that two tokens have the same, without bias: sum c (c - 1) / n (n - 1)."""
    m_M = np.arange(times_M.shape[-1])
    n = seen(times_M)
    return _over(times_M @ (m_M * (m_M - 1)), n * (n - 1))


def effective(times_M: Ints) -> Any:
    """1 / collision: as many equally frequent things collide as often; inf where nothing did.

    Its log2 (Renyi's entropy of order 2) is a lower bound of the entropy, and needs only about
    the square root of as many tokens.
    """
    with np.errstate(divide="ignore"):
        return 1 / collision(times_M)


def trusted(values: ArrayLike, times_M: Ints) -> Any:
    """The values where the coverage is `ENOUGH`; else NaN."""
    enough = np.nan_to_num(coverage(times_M)) >= ENOUGH
    return np.where(enough, values, np.nan)


def top_share(times_M: Ints, most: int) -> float:
    """Share of the tokens on the `most` commonest things."""
    counts = np.repeat(np.arange(len(times_M)), times_M)[::-1]
    return float(counts[:most].sum() / counts.sum()) if len(counts) else float("nan")


def _over(a: ArrayLike, b: ArrayLike) -> Any:
    return np.asarray(a) / _positive(b)


def _positive(n: ArrayLike) -> Floats:
    """NaN for none: there is no share of nothing."""
    n_ = np.asarray(n, float)
    return np.where(n_ > 0, n_, np.nan)
