"""Other sets of as many experts, drawn alike.

Legend: E experts, K choices per token, A alternatives.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray


def alternatives(
    own_K: NDArray[np.int64], experts: int, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Different sets of K experts `[A, K]`, none of them the own one; all there are, if fewer.

    Args:
        own_K: What the router chose.
        experts: E.
        count: A.
        rng: What they are drawn from.
    """
    K = len(own_K)
    own = frozenset(own_K.tolist())
    if comb(experts, K) - 1 <= 2 * count:  # drawing would mostly repeat itself
        others = [s for s in combinations(range(experts), K) if frozenset(s) != own]
        order = rng.permutation(len(others))[:count]
        return np.array([others[i] for i in order], np.int64).reshape(-1, K)
    found: dict[frozenset[int], NDArray[np.int64]] = {}
    while len(found) < count:
        drawn = rng.permutation(experts)[:K]
        if (key := frozenset(drawn.tolist())) != own:
            found.setdefault(key, drawn)
    return np.stack(list(found.values()))
