"""What a forward sends between ranks: rows to the experts' ranks, and as many results back.

Where dispatch is deduplicated (DeepEP), a token is sent once to each rank, or node, on which any of
its experts is; otherwise once per choice. What stays on its own rank is not sent.

T tokens, K choices of a token, R ranks, N nodes, B either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.placement.plan import Placement

Ints = NDArray[np.int64]


def sources(tokens: int, ranks: int) -> Ints:
    """The rank on which each token of a forward starts [T]: equal parts of the batch, in order."""
    return np.arange(tokens) * ranks // max(tokens, 1)


@dataclass(frozen=True)
class Sent:
    """Rows from each rank to each, and from each node to each; diagonals stay at home.

    Attributes:
        ranks_RR: A token once for each rank.
        choices_RR: A token once for each choice.
        nodes_NN: A token once for each node.
        choices_NN: A token once for each choice.
    """

    ranks_RR: Ints
    choices_RR: Ints
    nodes_NN: Ints
    choices_NN: Ints


def sent(slot_TK: NDArray[Any], source_T: NDArray[Any], placement: Placement) -> Sent:
    """What a layer's tokens send.

    Args:
        slot_TK: The slot of each choice (`plan.slots_of`), -1: none.
        source_T: The rank on which each token starts.
        placement: Of the slots.
    """
    tokens, ranks, nodes = len(slot_TK), placement.ranks, placement.nodes
    place_TK = np.where(slot_TK < 0, ranks, slot_TK // placement.slots_per_rank)
    there_TR = np.zeros((tokens, ranks + 1), bool)
    there_TR[np.arange(tokens)[:, None], place_TK] = True
    there_TR = there_TR[:, :ranks]
    node_TN = np.asarray(there_TR.reshape(tokens, nodes, ranks // nodes).any(axis=2), bool)
    key_TK = source_T[:, None] * (ranks + 1) + place_TK
    counted = np.bincount(key_TK.ravel(), minlength=ranks * (ranks + 1))
    choices_RR = counted.reshape(ranks, ranks + 1)[:, :ranks]
    by_node = choices_RR.reshape(nodes, ranks // nodes, nodes, ranks // nodes)
    return Sent(
        _counted(there_TR, source_T),
        choices_RR,
        _counted(node_TN, source_T // placement.ranks_per_node),
        by_node.sum((1, 3)),
    )


def _counted(there_TB: NDArray[np.bool_], source_T: NDArray[Any]) -> Ints:
    """Tokens from each source that go to each place [B, B]."""
    many = there_TB.shape[1]
    token_N, place_N = np.nonzero(there_TB)
    counted = np.bincount(source_T[token_N] * many + place_N, minlength=many * many)
    return counted.reshape(many, many)


def leaving(rows_BB: NDArray[Any]) -> int:
    """Rows that leave their rank or node."""
    return int(rows_BB.sum() - np.trace(rows_BB))
