"""Counts made up for placements."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.placement.balance import rank_rows
from moe_lens.replay.placement.counts import Counts
from moe_lens.replay.placement.plan import Placement
from moe_lens.trace.meta import LayerInfo


def counted(rows_FLE: NDArray[Any]) -> Counts:
    infos = [LayerInfo(i, f"layers.{i}", rows_FLE.shape[2], 2) for i in range(rows_FLE.shape[1])]
    keys = [(i, 0, "train") for i in range(len(rows_FLE))]
    return Counts(keys, infos, rows_FLE.astype(np.int32), len(keys), 0)


def rows_of(weights_LE: NDArray[Any], placement: Placement) -> NDArray[Any]:
    return rank_rows(counted(weights_LE[None]), placement)[0]
