"""Copies of heavy experts, and bins of equal size: the two steps of every placement by load.

Both are DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB, `replicate_experts` and
`balanced_packing`), for many layers at once, in the same order where weights are equal.

X problems side by side (layers, or nodes of layers), N items, P copies of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def replicated(weights_XN: NDArray[Any], copies: int) -> tuple[Ints, Ints]:
    """Every item once, then one more copy at a time of the item whose copies weigh most.

    An item's weight is divided evenly among its copies. The heaviest copy ends as light as it can.

    Args:
        weights_XN: Of the items.
        copies: P, N at least.

    Returns:
        The item of each copy [X, P], and how many copies each item has [X, N].
    """
    problems, items = weights_XN.shape
    item_XP = np.tile(np.arange(copies) % items, (problems, 1))
    count_XN = np.ones((problems, items), np.int64)
    each = np.arange(problems)
    for copy in range(items, copies):
        heaviest_X = np.argmax(weights_XN / count_XN, axis=1)
        item_XP[:, copy] = heaviest_X
        count_XN[each, heaviest_X] += 1
    return item_XP, count_XN


def packed(weights_XN: NDArray[Any], bins: int) -> Ints:
    """Items into bins of N / bins items each: the heaviest first, into the lightest that has room.

    Args:
        weights_XN: Of the items.
        bins: A divisor of N.

    Returns:
        Items [X, N], bin by bin, each bin in the order in which it was filled.
    """
    problems, items = weights_XN.shape
    room = items // bins
    if room == 1:
        return np.tile(np.arange(items), (problems, 1))
    order_XN = np.argsort(-weights_XN, axis=1, kind="stable")
    each = np.arange(problems)
    item_XBR = np.zeros((problems, bins, room), np.int64)
    load_XB = np.zeros((problems, bins))
    filled_XB = np.zeros((problems, bins), np.int64)
    for item_X in order_XN.T:
        bin_X = np.argmin(load_XB, axis=1)
        item_XBR[each, bin_X, filled_XB[each, bin_X]] = item_X
        filled_XB[each, bin_X] += 1
        full_X = filled_XB[each, bin_X] == room
        load_XB[each, bin_X] += np.where(full_X, np.inf, weights_XN[each, item_X])
    return item_XBR.reshape(problems, items)
