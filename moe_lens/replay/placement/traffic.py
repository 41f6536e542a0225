"""What a forward sends between ranks: rows to the experts' ranks, and as many results back.

Where dispatch is deduplicated (DeepEP), a token is sent once to each rank, or node, on which any of
its experts is; otherwise once per choice. What stays on its own rank is not sent.

T tokens, K choices of a token, S sources, B destinations (ranks or nodes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.placement.plan import Placement

Ints = NDArray[np.int64]


def sources(tokens: int, ranks: int) -> Ints:
    """The rank on which each token of a forward starts [T]: equal parts of the batch, in order."""
    return np.arange(tokens) * ranks // max(tokens, 1)


def matrix(
    slot_TK: NDArray[Any],
    source_T: NDArray[Any],
    placement: Placement,
    *,
    dedup: bool,
    nodes: bool = False,
) -> Ints:
    """Rows from each rank to each [R, R], or from each node to each; the diagonal stays at home.

    Args:
        slot_TK: The slot of each choice (`plan.slots_of`), -1: none.
        source_T: The rank on which each token starts.
        placement: Of the slots.
        dedup: A token counts once for each destination.
        nodes: Between nodes, not ranks.
    """
    many = placement.nodes if nodes else placement.ranks
    per = placement.slots // many
    from_T = source_T * many // placement.ranks
    place_TK = slot_TK // per  # -1 stays -1
    if dedup:
        there_TB = np.zeros((len(slot_TK), many + 1), bool)
        there_TB[np.arange(len(slot_TK))[:, None], place_TK] = True
        token_N, to_N = np.nonzero(there_TB[:, :many])
    else:
        token_N, at_N = np.nonzero(place_TK >= 0)
        to_N = place_TK[token_N, at_N]
    rows = np.bincount(from_T[token_N] * many + to_N, minlength=many * many)
    return rows.reshape(many, many)


def sent(rows_BB: NDArray[Any]) -> int:
    """Rows that leave their rank or node."""
    return int(rows_BB.sum() - np.trace(rows_BB))
