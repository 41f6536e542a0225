"""Experts that tokens choose together, onto one rank: fewer ranks a token has to be sent to.

The aim is ExFlow's (arXiv 2401.08383), the means that of Kernighan and Lin: from a placement by
load, pairs of experts change places while that brings companions together and no place gets more
than its share of the load by much.

L layers, E experts, P slots, X problems side by side (layers, or nodes of layers), N items, B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.placement.packing import packed, replicated

SLACK = 0.1
"""By how much of the mean a rank may be loaded beyond the mean, for the sake of companions."""

_NODE_SLACK = 0.02
"""The same for a node, whose ranks have their own."""

_ROUNDS = 3
"""Of swaps, at most; most is gained in the first."""

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


def grouped(
    weights_LE: NDArray[Any], together_LEE: NDArray[Any], slots: int, nodes: int, ranks: int
) -> Ints:
    """The expert in each slot [L, P]: first onto nodes, then onto each node's ranks.

    Args:
        weights_LE: What each expert has to do.
        together_LEE: How often a token chose both of two experts.
        slots: P.
        nodes: On which the ranks lie.
        ranks: R.
    """
    layers = len(weights_LE)
    item_LP, count_LE = replicated(weights_LE, slots)
    share_LP = np.take_along_axis(1 / count_LE, item_LP, 1)
    weight_LP = np.take_along_axis(weights_LE, item_LP, 1) * share_LP
    each = np.arange(layers)[:, None, None]
    near_LPP = together_LEE[each, item_LP[:, :, None], item_LP[:, None, :]].astype(np.float32)
    near_LPP *= (share_LP[:, :, None] * share_LP[:, None, :]).astype(np.float32)
    # Two replicas of an expert are of no use in one place.
    near_LPP[item_LP[:, :, None] == item_LP[:, None, :]] = 0
    total_L = weight_LP.sum(1)
    order_LP = _binned(weight_LP, near_LPP, nodes, (1 + _NODE_SLACK) * total_L / nodes)
    inner_XN = order_LP.reshape(layers * nodes, slots // nodes)
    layer_X = np.repeat(np.arange(layers), nodes)[:, None]
    near_XNN = near_LPP[layer_X[:, :, None], inner_XN[:, :, None], inner_XN[:, None, :]]
    limit_X = (1 + SLACK) * np.repeat(total_L, nodes) / ranks
    order_XN = _binned(weight_LP[layer_X, inner_XN], near_XNN, ranks // nodes, limit_X)
    order_LP = np.take_along_axis(inner_XN, order_XN, 1).reshape(layers, slots)
    return np.take_along_axis(item_LP, order_LP, 1)


def _binned(weight_XN: Floats, near_XNN: Floats, bins: int, limit_X: Floats) -> Ints:
    """Items [X, N] bin by bin, equally many in each, and no bin beyond its limit if it need not."""
    problems, items = weight_XN.shape
    if bins == 1:
        return np.tile(np.arange(items), (problems, 1))
    each_X1 = np.arange(problems)[:, None]
    bin_XN = np.empty((problems, items), np.int64)
    bin_XN[each_X1, packed(weight_XN, bins)] = np.arange(items) // (items // bins)
    in_bin_XNB = (bin_XN[:, :, None] == np.arange(bins)).astype(np.float32)
    load_XB = (weight_XN[:, None] @ in_bin_XNB)[:, 0]
    pull_XBN = in_bin_XNB.transpose(0, 2, 1) @ near_XNN  # companions of each item in each bin
    for _ in range(_ROUNDS):
        if not _swapped(bin_XN, load_XB, pull_XBN, weight_XN, near_XNN, limit_X):
            break
    return np.argsort(bin_XN, axis=1, kind="stable")


def _swapped(
    bin_XN: Ints,
    load_XB: Floats,
    pull_XBN: Floats,
    weight_XN: Floats,
    near_XNN: Floats,
    limit_X: Floats,
) -> bool:
    """One round: every item with the best partner in another bin, where both together gain."""
    problems, items = weight_XN.shape
    each = np.arange(problems)
    own_XN = np.take_along_axis(pull_XBN, bin_XN[:, None], 1)[:, 0]
    any_swap = False
    for item in range(items):
        here_X = bin_XN[:, item]
        gain_XN = np.take_along_axis(pull_XBN[:, :, item], bin_XN, 1) - own_XN[:, item, None]
        gain_XN += pull_XBN[each, here_X] - own_XN - 2 * near_XNN[:, item]
        # What comes here leaves there. Neither may get heavier than it may be, or is already.
        moved_XN = weight_XN - weight_XN[:, item, None]
        load_XN, load_X = np.take_along_axis(load_XB, bin_XN, 1), load_XB[each, here_X]
        highest_XN = np.maximum(load_X[:, None] + moved_XN, load_XN - moved_XN)
        allowed_XN = np.maximum(limit_X[:, None], np.maximum(load_X[:, None], load_XN))
        gain_XN[(bin_XN == here_X[:, None]) | (highest_XN > allowed_XN)] = -np.inf
        other_X = gain_XN.argmax(1)
        least_X = 1e-9 * np.maximum(1.0, near_XNN[:, item].sum(1))
        x = np.flatnonzero(gain_XN[each, other_X] > least_X)
        if not len(x):
            continue
        any_swap = True
        other, here, there = other_X[x], here_X[x].copy(), bin_XN[x, other_X[x]]
        load_XB[x, here] += moved_XN[x, other]
        load_XB[x, there] -= moved_XN[x, other]
        change_xN = near_XNN[x, other] - near_XNN[x, item]
        pull_XBN[x, here] += change_xN
        pull_XBN[x, there] -= change_xN
        bin_XN[x, item], bin_XN[x, other] = there, here
        own_XN[x] = pull_XBN[x[:, None], bin_XN[x], np.arange(items)]
    return any_swap
