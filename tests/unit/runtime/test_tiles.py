"""Which tiles are chosen, and that the grid has room for every routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.runtime.gemm import tiles


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.sampled_from(tiles.BLOCK_ROWS))
def test_the_grid_holds_every_tile(rows, block):
    needed = sum(-(-r // block) for r in rows)
    assert needed <= tiles.tile_bound(sum(rows), len(rows), block)


@pytest.mark.parametrize("block", tiles.BLOCK_ROWS)
def test_the_grid_is_no_larger_than_some_routing_needs(block):
    # Every expert but one has one row; the last has all the others, one more than fills its tiles.
    rows = [1] * 7 + [3 * block + 1]
    assert sum(-(-r // block) for r in rows) == tiles.tile_bound(sum(rows), 8, block)


@pytest.mark.parametrize(
    ("rows", "block"),
    [
        ([4] * 64, 16),  # decode
        ([16] * 8, 16),
        ([30] * 8, 32),
        ([60] * 8, 64),
        ([512] * 64, 128),  # prefill
        ([2000] + [3] * 63, 32),  # one hot expert among many that are nearly idle
        ([4000] * 4 + [3] * 10, 128),
        ([0, 0], 16),
        ([], 16),
    ],
)
def test_recorded_rows_choose_the_tile(rows, block):
    assert tiles.block_rows(rows) == block


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("rows", tiles.BLOCK_ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tile_fits_the_smallest_shared_memory(dtype, rows, swiglu):
    tile = tiles.tile_for(rows, dtype, swiglu=swiglu)
    assert tile.rows == rows
    assert tile.shared_bytes(dtype.itemsize, swiglu=swiglu) <= 99 * 1024
