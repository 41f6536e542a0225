"""Rows of decoder blocks with experts, against `numpy.delete`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from moe_lens.errors import ImportRefused
from moe_lens.importers.blocks import blocks_of
from moe_lens.importers.source import Given


@drawn(B=st.integers(1, 8), T=st.integers(0, 5), K=st.integers(1, 3), data=st.data())
def test_takes_the_blocks_with_experts(B: int, T: int, K: int, data: Any) -> None:
    dense = tuple(data.draw(st.sets(st.integers(0, B - 1), max_size=B - 1)))
    ids_TBK = np.arange(T * B * K, dtype=np.uint16).reshape(T, B, K)
    ids_TBK[:, list(dense)] = 0
    blocks = blocks_of(Given(experts=500, dense_blocks=dense), ids_TBK.shape, "here")
    assert np.array_equal(blocks.take(ids_TBK, "here"), np.delete(ids_TBK, list(dense), axis=1))
    layers = blocks.layers(Given(), "vllm")
    assert [x.layer for x in layers] == list(range(B - len(dense)))
    assert {x.block for x in layers}.isdisjoint(dense)


def test_a_leading_dense_block_costs_no_copy() -> None:
    ids_TBK = np.ones((5, 4, 2), np.uint8)
    ids_TBK[:, 0] = 0
    blocks = blocks_of(Given(experts=4, dense_blocks=(0,)), ids_TBK.shape, "here")
    assert np.shares_memory(blocks.take(ids_TBK, "here"), ids_TBK)


@pytest.mark.parametrize("experts", [256, 257])
def test_ids_have_room_for_all_experts(experts: int) -> None:
    ids_TBK = np.ones((1, 1, 1), np.uint8)
    blocks = blocks_of(Given(experts=experts), ids_TBK.shape, "here")
    if experts == 256:
        assert blocks.take(ids_TBK, "here") is ids_TBK
    else:
        with pytest.raises(ImportRefused, match="uint8, which has no room for 257 experts"):
            blocks.take(ids_TBK, "here")
