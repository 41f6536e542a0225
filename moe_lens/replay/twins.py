"""Twins of a workload: as many rows of the same tokens, spread evenly over experts.

What a routing costs beside one without favourites is its time over a twin's. Two are needed: the
balanced twin spreads over all experts, and where the routing touches only some of them (decoding),
it has more weights to read, which looks as if balance were slow. The same-touched twin spreads
over the very experts that the routing touched.

T tokens, K choices of a token, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


def balanced(expert_ids_TK: Ids, experts: int) -> Ids:
    """The same slots, dealt out to all experts in turn.

    The r-th slot that runs goes to expert r mod E. Loads differ by one at most, as many experts are
    touched as there are slots for, and no token has an expert twice: it has at most E slots, and
    they are dealt out one after the other.

    Args:
        expert_ids_TK: int32; -1: no expert runs, here and in the twin.
        experts: E.
    """
    return _dealt(expert_ids_TK, np.arange(experts, dtype=np.int32))


def same_touched(expert_ids_TK: Ids) -> Ids:
    """The same slots, dealt out in turn to the experts that were touched, and to no other."""
    return _dealt(expert_ids_TK, np.unique(expert_ids_TK[expert_ids_TK >= 0]))


def _dealt(expert_ids_TK: Ids, experts: Ids) -> Ids:
    runs_TK = expert_ids_TK >= 0
    place_TK = runs_TK.cumsum().reshape(runs_TK.shape) - 1
    if not len(experts):
        return np.full_like(expert_ids_TK, -1)
    return np.where(runs_TK, experts[place_TK % len(experts)], -1).astype(np.int32)
