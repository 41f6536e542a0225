"""How the choices of each tag fall on the experts: what tags say about experts, and by chance.

The null permutes tags over documents: the tokens of one sequence resemble each other, so that a
test which takes them for independent finds a domain in anything. A document is a sequence, or where
a sequence has tokens of several tags, those of one tag. Documents that were cut into several
sequences are taken for as many: their null is then too narrow.

Legend: ... any leading axes (draws), R draws, G tags, S documents, X, Y values of two variables, E
experts, N tokens, K choices of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.chance import SEED, Floats, Ints

PERMUTATIONS = 199
"""Beyond all of them is beyond 0.5 %, on either side."""
ENOUGH = 10
"""Choices per expert that a tag must have made for its profile to be compared."""

Counts = NDArray[Any]


def x_ln_x(counts: Counts) -> Floats:
    """Each count times its logarithm; 0 ln 0 = 0."""
    c = np.asarray(counts, float)
    return np.asarray(c * np.log(np.where(c > 0, c, 1.0)))


def mutual_information(counts_XY: Counts) -> Any:
    """I(X; Y) in nats of counts `[..., X, Y]`, as they are: above 0 by chance.

    By about (X - 1)(Y - 1) / 2n of n independent pairs. NaN where there are none.
    """
    c = np.asarray(counts_XY, float)
    n = c.sum((-1, -2))
    joint = x_ln_x(c).sum((-1, -2))
    alone = x_ln_x(c.sum(-1)).sum(-1) + x_ln_x(c.sum(-2)).sum(-1)
    nats = (joint - alone) / np.where(n > 0, n, np.nan) + np.log(np.where(n > 0, n, 1.0))
    return np.maximum(nats, 0.0)


def entropies(counts_X: Counts) -> Any:
    """Entropy in nats of counts `[..., X]`; NaN where there are none."""
    c = np.asarray(counts_X, float)
    n = c.sum(-1)
    return np.log(np.where(n > 0, n, 1.0)) - x_ln_x(c).sum(-1) / np.where(n > 0, n, np.nan)


def compared(counts_GE: Counts) -> NDArray[np.bool_]:
    """Tags that made enough choices to have a profile, `[..., G]`."""
    c = np.asarray(counts_GE)
    return np.asarray(c.sum(-1) >= ENOUGH * c.shape[-1])


def mean_of_pairs(matrix_GG: Floats, of_G: NDArray[np.bool_]) -> Any:
    """Mean over the pairs of these tags; NaN with fewer than two."""
    upper = np.triu_indices(matrix_GG.shape[-1], 1)
    wanted = of_G[..., upper[0]] & of_G[..., upper[1]]
    pairs = wanted.sum(-1)
    total = np.where(wanted, matrix_GG[..., upper[0], upper[1]], 0.0).sum(-1)
    return total / np.where(pairs > 0, pairs, np.nan)


def leading(counts_GE: Counts) -> NDArray[np.bool_]:
    """The fewest experts that take half of a tag's choices, `[..., G, E]`.

    Experts that have as many as the last of them are of them.
    """
    c = np.asarray(counts_GE)
    sorted_GE = -np.sort(-c, axis=-1)
    half = 2 * sorted_GE.cumsum(-1) >= c.sum(-1, keepdims=True)
    last_G = np.take_along_axis(sorted_GE, half.argmax(-1)[..., None], -1)
    return np.asarray((c >= last_G) & (c > 0))


def committee(counts_GE: Counts) -> NDArray[np.bool_]:
    """The experts that are leading in every tag that can be compared, `[..., E]`."""
    return np.asarray((leading(counts_GE) | ~compared(counts_GE)[..., None]).all(-2))


def tally(value_N: Ints, ids_NK: Ints, values: int, experts: int) -> Ints:
    """`[X, E]`: choices of each expert (ids -1 are none) by tokens with each value, 0 to X - 1."""
    keys_KN = value_N * (experts + 1) + 1 + ids_NK.T
    counts = np.bincount(keys_KN.ravel(), minlength=values * (experts + 1))
    return np.asarray(counts.reshape(values, experts + 1)[:, 1:])


def moved_tags(ids_NK: Ints, tag_N: Ints, sequence_N: Ints, tags: int, experts: int) -> Floats:
    """`[R, G, E]`: choices by tag, with the tags permuted over the documents."""
    documents, at_N = np.unique(sequence_N * tags + tag_N, return_inverse=True)
    return permuted(tally(at_N, ids_NK, len(documents), experts), documents % tags, tags)


def permuted(sums_SY: Counts, tag_S: Ints, tags: int) -> Floats:
    """`[R, G, Y]`: sums of documents by tag, with the tags permuted over the documents."""
    sums = np.asarray(sums_SY, float)
    rng = np.random.default_rng(SEED)
    out_RGY = np.empty((PERMUTATIONS, tags, sums.shape[1]))
    for moved_GY in out_RGY:
        moved_GY[:] = (rng.permutation(tag_S) == np.arange(tags)[:, None]) @ sums
    return out_RGY
