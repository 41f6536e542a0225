"""What a metric shows by chance alone: counts of a router that draws its experts uniformly.

Each of T tokens draws its k of E experts without replacement, all sets alike, independently of the
other tokens. The mean of n_i is then mu = T k / E, its variance mu (1 - k/E), whatever the other
experts have. Tokens of real text are not independent: with few documents more is chance than this.

Legend: ... any leading axes, R draws, F forwards, E experts, J choices a token has still to make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DRAWS = 999
"""Of the counts of a whole layer: beyond all of them is beyond 0.1 %, on either side."""
FORWARD_DRAWS = 199
"""Of the counts of single forwards: beyond all of them is beyond 0.5 %."""
SEED = 0


@dataclass(frozen=True)
class Chance:
    """What a metric is by chance.

    Attributes:
        expected: Its mean, or the one value that the null has.
        low: The lowest of the draws; None: nothing was drawn, so nothing can be called beyond it.
        high: The highest.
    """

    expected: float
    low: float | None = None
    high: float | None = None

    def beyond(self, value: float) -> str:
        """`high`, `low`, or nothing: whether the value is beyond all draws."""
        # A hair's breadth is arithmetic: entropies of the same counts differ in the last bit.
        hair = 1e-12 * max(1.0, abs(value))
        if self.high is not None and value > self.high + hair:
            return "high"
        if self.low is not None and value < self.low - hair:
            return "low"
        return ""


def of_draws(values_R: ArrayLike) -> Chance:
    """The chance that draws of a metric show; draws without a number (NaN) are left out."""
    values = np.asarray(values_R, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return Chance(float("nan"))
    return Chance(float(values.mean()), float(values.min()), float(values.max()))


def uniform_counts(
    tokens: ArrayLike, choices: ArrayLike, experts: int, rng: np.random.Generator
) -> Ints:
    """Counts of each expert, `[..., E]`, of a router that draws uniformly: exact, at any T.

    Expert by expert: a token that has j choices to make among m experts takes the next one with
    probability j / m. So the tokens need only be counted by how many choices they have left.

    Args:
        tokens: `[...]`: T.
        choices: `[...]`: N, choices of all tokens. k = N / T; where that is no whole number, some
            tokens make one choice more than others.
        experts: E.
        rng: Where the numbers come from.

    Raises:
        ValueError: More choices than there are experts, or choices of no tokens.
    """
    tokens_X, choices_X = np.broadcast_arrays(np.asarray(tokens), np.asarray(choices))
    if (choices_X > tokens_X * experts).any() or (choices_X < 0).any():
        raise ValueError(
            f"a token chooses at most each of {experts} experts once; got {choices_X.max()} "
            f"choices of {tokens_X.max()} tokens"
        )
    each_X = choices_X // np.maximum(tokens_X, 1)
    more_X = choices_X - each_X * tokens_X
    left_XJ = np.zeros((*tokens_X.shape, int(each_X.max(initial=0)) + 2), np.int64)
    np.put_along_axis(left_XJ, each_X[..., None], (tokens_X - more_X)[..., None], -1)
    np.put_along_axis(left_XJ, each_X[..., None] + 1, more_X[..., None], -1)
    j_J = np.arange(left_XJ.shape[-1])
    counts_XE = np.empty((*tokens_X.shape, experts), np.int64)
    for expert in range(experts):
        taken_XJ = rng.binomial(left_XJ, np.minimum(1.0, j_J / (experts - expert)))
        counts_XE[..., expert] = taken_XJ.sum(-1)
        left_XJ -= taken_XJ
        left_XJ[..., :-1] += taken_XJ[..., 1:]
    return counts_XE


def draws_of(tokens: int, choices: int, experts: int) -> Ints:
    """`[R, E]`: draws of a layer's counts. The same numbers give the same draws."""
    return _drawn((tokens,), (choices,), experts, DRAWS)[:, 0]


def draws_of_forwards(tokens_F: Ints, choices_F: Ints, experts: int) -> Ints:
    """`[R, F, E]`: draws of the counts of each forward."""
    return _drawn(tuple(tokens_F.tolist()), tuple(choices_F.tolist()), experts, FORWARD_DRAWS)


def of_forwards_drawn(
    function: Callable[..., ArrayLike],
    tokens_F: Ints,
    choices_F: Ints,
    experts: int,
    *more: tuple[float, ...],
) -> Chance:
    """The chance of a function of draws of forwards; layers that are alike share it.

    Args:
        function: Of `[R, F, E]` draws and `more`, gives `[R]`; a function of a module, so that it
            is the same one at each call.
        tokens_F: Of each forward.
        choices_F: Of each forward.
        experts: E.
        more: What else the function is given.
    """
    key = tuple(tokens_F.tolist()), tuple(choices_F.tolist())
    return _forwards_drawn(function, *key, experts, more)


@lru_cache(maxsize=64)
def _forwards_drawn(
    function: Callable[..., ArrayLike],
    tokens: tuple[int, ...],
    choices: tuple[int, ...],
    experts: int,
    more: tuple[tuple[float, ...], ...],
) -> Chance:
    return of_draws(function(_drawn(tokens, choices, experts, FORWARD_DRAWS), *more))


@lru_cache(maxsize=8)
def _drawn(tokens: tuple[int, ...], choices: tuple[int, ...], experts: int, draws: int) -> Ints:
    shape = (draws, len(tokens))
    counts = uniform_counts(
        np.broadcast_to(np.array(tokens, np.int64), shape),
        np.broadcast_to(np.array(choices, np.int64), shape),
        experts,
        np.random.default_rng(SEED),
    )
    counts.flags.writeable = False
    return counts
