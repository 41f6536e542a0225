"""One value, [B], [B, S] or cumulative lengths become one value per token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lens_hooks.batch import Describer, StepContext, padding_from_mask


def describe(shape, describer=None, mask=None, positions=None, past=0, continues=False, **said):
    describer = describer or Describer(lambda tag: tag)
    return describer.describe(
        shape,
        StepContext(**said),
        padding=mask,
        positions=positions,
        past=past,
        continues=continues,
        keeps=lambda sequences: np.ones(len(sequences), bool),
        device=torch.device("cpu"),
    )


def by_token(batch):
    return [batch.tags[i] for i in batch.tag_T]


def test_tags_as_one_value_per_sequence_and_per_token():
    assert by_token(describe((2, 2))) == ["untagged"] * 4
    assert by_token(describe((2, 2), tags="x")) == ["x"] * 4
    assert by_token(describe((2, 2), tags=["x", "y"])) == ["x", "x", "y", "y"]
    assert by_token(describe((2, 2), tags=[["x", "y"], ["y", "y"]])) == ["x", "y", "y", "y"]
    assert by_token(describe((2, 2), tags=torch.tensor([3, 4]))) == ["3", "3", "4", "4"]


def test_sb_layout_flattens_positions_first():
    describer = Describer(lambda tag: tag, "sb")
    batch = describe((2, 3), describer, tags=["x", "y"])
    assert by_token(batch) == ["x", "y"] * 3
    assert batch.position_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.sequence_T.tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match="layout='xy'"):
        Describer(lambda tag: tag, "xy")


def test_every_row_is_a_new_sequence_unless_it_continues_or_was_named():
    describer = Describer(lambda tag: tag)
    assert describe((2, 2), describer).sequence_T.tolist() == [0, 0, 1, 1]
    assert describe((2, 1), describer, continues=True, past=2).sequence_T.tolist() == [0, 1]
    assert describe((2, 1), describer).sequence_T.tolist() == [2, 3]
    named = describe((2, 1), describer, sequences=["r7", "r8"])
    assert [(n, said) for n, _, said, _ in named.first_seen] == [(4, "r7"), (5, "r8")]
    again = describe((2, 1), describer, sequences=["r8", "r9"], past=4)
    assert again.sequence_T.tolist() == [5, 6]
    assert again.position_N.tolist() == [4, 4]
    assert [said for _, _, said, _ in again.first_seen] == ["r9"]


def test_cumulative_lengths_pack_sequences_into_one_row():
    batch = describe((1, 6), sequences=torch.tensor([0, 2, 6]), tags=["x", "y"])
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.position_N.tolist() == [0, 1, 0, 1, 2, 3]
    assert by_token(batch) == ["x"] * 2 + ["y"] * 4
    assert batch.sequences_G.tolist() == [1, 1]
    with pytest.raises(ValueError, match="end at 5, but this forward has 6"):
        describe((1, 6), sequences=[0, 2, 5])


def test_sequence_ids_per_token_pack_too():
    batch = describe((2, 3), sequences=[[7, 7, 8], [8, 9, 9]])
    assert batch.sequence_T.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.position_N.tolist() == [0, 1, 0, 0, 0, 1]


def test_positions_the_model_was_given_win():
    given = torch.tensor([[0, 0, 1], [0, 1, 2]])
    assert describe((2, 3), positions=given).position_N.tolist() == [0, 0, 1, 0, 1, 2]


def test_padding_as_mask_lengths_or_nothing():
    mask = torch.tensor([[True, False], [False, False]])
    for said in (mask, mask.tolist(), mask.numpy()):
        batch = describe((2, 2), padding=said)
        assert batch.padding_T.tolist() == [True, False, False, False]
        assert batch.tokens_G.tolist() == [3]


def test_padding_lengths_are_of_valid_tokens_and_false_overrules_the_mask():
    def padded(said):
        mask = torch.ones(2, 3, dtype=torch.bool)
        return describe((2, 3), mask=mask, padding=said).padding_T

    assert padded([1, 3]).tolist() == [False, True, True, False, False, False]
    assert padded(False) is None
    assert padded(None).all()


def test_attention_mask_of_decoding_covers_the_past_too():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert padding_from_mask(mask, 2, 1).tolist() == [[False], [False]]
    assert padding_from_mask(mask, 2, 4).tolist()[0] == [True, False, False, False]
    assert padding_from_mask(mask, 3, 4) is None
    assert padding_from_mask(mask[None], 2, 4) is None
    assert padding_from_mask("sdpa", 2, 4) is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tags": ["x", "y", "z"]}, "tags has 3 values, but this forward has 2 sequences"),
        ({"tags": [["x"], ["y"]]}, r"tags has shape \[2, 1\]"),
        ({"sequences": ["a"]}, r"sequences has shape \[1\]"),
        ({"padding": torch.zeros(3, 2, dtype=torch.bool)}, r"padding has shape \[3, 2\]"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused_with_both_sizes(said, message):
    with pytest.raises(ValueError, match=message):
        describe((2, 2), **said)


def test_an_empty_batch_is_described():
    batch = describe((2, 0), tags=["x", "y"])
    assert batch.size == 0
    assert batch.rows_N is None
    assert int(batch.tokens_G.sum()) == 0
