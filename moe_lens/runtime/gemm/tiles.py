"""Which tiles the Triton kernel uses: a pure choice, changed here and nowhere else.

A tile of many rows reads an expert's weights fewer times; a tile that is larger than an expert's
rows computes rows that nobody asked for. So the rows that were recorded decide, not the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

BLOCK_ROWS = (16, 32, 64, 128)

OVERHEAD_ROWS = 32
"""What a tile costs beyond its rows, in rows: its part of the weights must be loaded whatever it
multiplies. An estimate, not yet measured on a GPU."""


@dataclass(frozen=True)
class Tile:
    """What one program computes: `rows` x `columns`, in steps of `depth` of the sum.

    Attributes:
        rows: BLOCK_M.
        columns: BLOCK_N. With SwiGLU a program holds two such tiles, of gate and of up.
        depth: BLOCK_K.
        warps: Warps of a program.
        stages: Loads in flight. What they hold in shared memory stays below 99 KB, the least that
            an architecture since sm_80 gives a program (sm_86, sm_89, sm_120).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, size: int, *, swiglu: bool) -> int:
        """Shared memory of the loads in flight, for numbers of `size` bytes."""
        columns = self.columns * (2 if swiglu else 1)
        return self.stages * (self.rows + columns) * self.depth * size


def block_rows(rows_E: Iterable[int]) -> int:
    """The BLOCK_M that takes least for experts with these rows.

    Args:
        rows_E: Rows of each expert in one forward, as recorded or as expected.
    """
    rows = [r for r in rows_E if r > 0]
    costs = {m: (m + OVERHEAD_ROWS) * sum(-(-r // m) for r in rows) for m in BLOCK_ROWS}
    return min(BLOCK_ROWS, key=lambda m: costs[m])


def tile_for(rows: int, dtype: torch.dtype, *, swiglu: bool) -> Tile:
    """The tile of `rows` rows (BLOCK_M) for this dtype."""
    wide = dtype.itemsize > 2
    depth = 32 if wide else 64
    if rows <= 32:
        return Tile(rows, 64, depth, warps=4, stages=4)
    if wide:  # float32 is multiplied without tensor cores: registers are what is short
        return Tile(rows, 32 if swiglu else 64, depth, warps=8, stages=3)
    if rows == 64:
        return Tile(rows, 64 if swiglu else 128, depth, warps=4, stages=3)
    return Tile(rows, 64 if swiglu else 128, depth, warps=8, stages=3)


def tile_bound(rows: int, experts: int, block: int) -> int:
    """The most tiles of `block` rows that this many rows can need in this many groups.

    Full tiles are at most rows // block, and each group that has a row adds at most one more.
    """
    return rows // block + min(rows, experts)
