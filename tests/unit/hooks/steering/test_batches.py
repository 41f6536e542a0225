"""Where a batch's tokens stand in their sequences: against a plain loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens_hooks.steering.batches import place


def looped(mask, past_mask=None):
    """(run, position) of each token of `[B, S]`, padding (-1, None); a row is a sequence."""
    out, run = [], -1
    for b, row in enumerate(mask):
        position = 0 if past_mask is None else sum(past_mask[b])
        if any(row):
            run += 1
        for valid in row:
            out.append((run, position) if valid else (-1, None))
            position += valid
    return out


def check(placed, expected):
    assert placed.runs == 1 + max((run for run, _ in expected), default=-1)
    for run, position, (want_run, want_position) in zip(
        placed.run_T, placed.position_T, expected, strict=True
    ):
        assert run == want_run
        assert want_position is None or position == want_position


masks = st.integers(1, 4).flatmap(
    lambda S: st.lists(st.lists(st.integers(0, 1), min_size=S, max_size=S), min_size=1, max_size=4)
)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_padding_is_in_no_sequence_and_counts_for_no_position(mask):
    inputs = {
        "input_ids": torch.zeros(len(mask), len(mask[0])),
        "attention_mask": torch.tensor(mask),
    }
    for shape in ((len(mask), len(mask[0])), (len(mask) * len(mask[0]),), ()):
        check(place(inputs, "main", shape, 0, "bs"), looped(mask))
    turned = place(inputs, "main", (len(mask[0]), len(mask)), 0, "sb")
    flat = place(inputs, "main", (), 0, "bs")
    B, S = len(mask), len(mask[0])
    assert (flat.run_T.reshape(B, S) == turned.run_T.reshape(S, B).T).all()


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(1, 5), st.data())
def test_a_cache_goes_on_behind_what_is_valid_in_it(mask, past, data):
    before = [data.draw(st.lists(st.integers(0, 1), min_size=past, max_size=past)) for _ in mask]
    whole = torch.tensor([a + b for a, b in zip(before, mask, strict=True)])
    inputs = {"input_ids": torch.zeros(len(mask), len(mask[0])), "attention_mask": whole}
    check(place(inputs, "main", (), past, "bs"), looped(mask, before))


def test_without_a_mask_every_token_counts():
    inputs = {"input_ids": torch.zeros(2, 3)}
    check(place(inputs, "main", (2, 3), 0, "bs"), looped([[1, 1, 1]] * 2))
    assert place(inputs, "main", (2, 3), 4, "bs").position_T.tolist() == [4, 5, 6] * 2


@pytest.mark.parametrize(
    "inputs",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6])},
    ],
)
def test_packed_rows_hold_several_sequences(inputs):
    placed = place({"input_ids": torch.zeros(1, 6), **inputs}, "main", (1, 6), 0, "bs")
    assert placed.runs == 3
    assert placed.run_T.tolist() == [0, 0, 0, 1, 1, 2]
    assert placed.position_T.tolist() == [0, 1, 2, 0, 1, 0]


def test_the_decoder_has_a_mask_of_its_own():
    inputs = {
        "input_ids": torch.zeros(1, 4),
        "decoder_input_ids": torch.zeros(1, 3),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "decoder_attention_mask": torch.tensor([[0, 1, 1]]),
    }
    assert place(inputs, "encoder", (1, 4), 0, "bs").run_T.tolist() == [0, 0, 0, -1]
    assert place(inputs, "decoder", (1, 3), 0, "bs").run_T.tolist() == [-1, 0, 0]
    assert place(inputs, "decoder", (3,), 0, "bs").position_T.dtype == np.int64
