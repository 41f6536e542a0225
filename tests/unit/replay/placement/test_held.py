"""What a rank holds: weights that layers share lie there once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.placements import counted

from moe_lens.replay.placement.fit import Group, placed
from moe_lens.replay.placement.what_if import held_bytes

BYTES_L = np.array([10, 10, 7])


def test_experts_that_layers_share_are_held_once() -> None:
    counts = counted(np.ones((1, 3, 4), int))
    placement = placed("contiguous", Group(2, 0, 1), counts)  # experts 0, 1 and 2, 3
    own = counts.infos
    assert held_bytes(placement, own, BYTES_L) == 2 * 27
    whole = [own[0], replace(own[1], identities=["0/0", "0/1", "0/2", "0/3"]), own[2]]
    assert held_bytes(placement, whole, BYTES_L) == 2 * 10 + 2 * 7
    # Expert 1/0 lies beside 0/0, which it is; 1/3 is 0/0 too, on the other rank.
    some = [own[0], replace(own[1], identities=["0/0", "1/1", "1/2", "0/0"]), own[2]]
    assert held_bytes(placement, some, BYTES_L) == 2 * 27
    first = [own[0], replace(own[1], identities=["0/0", "0/1", "0/2", "1/3"]), own[2]]
    assert held_bytes(placement, first, BYTES_L) == 2 * 10 + 10 + 2 * 7
