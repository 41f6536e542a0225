"""One value, [B], [B, S] or cumulative lengths become one value per token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lens_hooks import describe as describe_module
from moe_lens_hooks.describe import Describer, Given
from moe_lens_hooks.following import Going
from moe_lens_hooks.inputs import batch_shape, cached_length, packed_lengths
from moe_lens_hooks.masks import padding_from_mask
from moe_lens_hooks.owners import owned_by_lengths, owned_on_device
from moe_lens_hooks.said import said

CPU = torch.device("cpu")


def all_of(sequences):
    return np.ones(len(sequences), bool)


class Described:
    """A batch as it lands on the host, with the batch itself."""

    def __init__(self, batch, rows):
        self.batch, self.rows = batch, rows
        self.landed = batch.land(t.numpy() for t in batch.tensors())

    def __getattr__(self, name):
        return getattr(self.landed, name)

    @property
    def by_token(self):
        return [self.batch.tags[i] for i in self.tag_T]


def describe(
    shape, describer=None, mask=None, positions=None, lengths=None, going=None, keeps=None, **given
):
    describer = describer or Describer(lambda tag: tag)
    keys = given.pop("keys", None)
    names = ("tags", "sequences", "padding", "phase")
    context = said(*(given.get(n) for n in names), keys, declared=list(keys or ()))
    told = Given(padding=padding_from_mask(mask, *shape), mask=mask, positions=positions)
    told.lengths = lengths
    return Described(
        *describer.describe(shape, context, told, going or Going(), keeps or all_of, CPU)
    )


def after(earlier, past, **more):
    """The cache of an earlier forward holds `past` positions."""
    return Going(cache=object(), past=past, rows=earlier.rows, **more)


def test_tags_as_one_value_per_sequence_and_per_token():
    assert describe((2, 2)).by_token == ["untagged"] * 4
    assert describe((2, 2), tags="x").by_token == ["x"] * 4
    assert describe((2, 2), tags=["x", "y"]).by_token == ["x", "x", "y", "y"]
    assert describe((2, 2), tags=[["x", "y"], ["y", "y"]]).by_token == ["x", "y", "y", "y"]
    assert describe((2, 2), tags=torch.tensor([3, 4])).by_token == ["3", "3", "4", "4"]
    tensors = [torch.tensor(3), torch.tensor(4)]
    assert describe((2, 2), tags=tensors).by_token == ["3", "3", "4", "4"]


def test_none_among_the_tags_is_untagged():
    assert describe((2, 1), tags=["x", None]).by_token == ["x", "untagged"]
    assert describe((1, 2), tags=[[None, "x"]]).by_token == ["untagged", "x"]


def test_sb_layout_flattens_positions_first():
    describer = Describer(lambda tag: tag, "sb")
    batch = describe((2, 3), describer, tags=["x", "y"])
    assert batch.by_token == ["x", "y"] * 3
    assert batch.position_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.sequence_T.tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match="layout='xy'"):
        Describer(lambda tag: tag, "xy")


def test_every_row_is_a_new_sequence_unless_it_goes_on_or_was_named():
    describer = Describer(lambda tag: tag)
    first = describe((2, 2), describer)
    assert first.sequence_T.tolist() == [0, 0, 1, 1]
    assert describe((2, 1), describer, going=after(first, 2)).sequence_T.tolist() == [0, 1]
    assert describe((2, 1), describer).sequence_T.tolist() == [2, 3]
    named = describe((2, 1), describer, sequences=["r7", "r8"])
    assert [(x.sequence, x.request) for x in named.begin] == [(4, "r7"), (5, "r8")]
    again = describe((2, 1), describer, sequences=["r8", "r9"], going=Going(past=4))
    assert again.sequence_T.tolist() == [5, 6]
    assert again.position_N.tolist() == [4, 4]
    assert [x.request for x in again.begin] == ["r9"]


def test_the_same_request_twice_in_a_batch_is_two_sequences():
    describer = Describer(lambda tag: tag)
    batch = describe((2, 1), describer, sequences=["r", "r"])
    assert batch.sequence_T.tolist() == [0, 1]
    assert describe((2, 1), describer, sequences=["r", "r"]).sequence_T.tolist() == [0, 1]


def test_requests_are_forgotten_after_many_others(monkeypatch):
    monkeypatch.setattr(describe_module, "REQUESTS", 3)
    describer = Describer(lambda tag: tag)
    for name in "abcd":
        describe((1, 1), describer, sequences=[name])
    assert len(describer._requests) == 3
    assert describe((1, 1), describer, sequences=["b"]).sequence_T.tolist() == [1]
    assert describe((1, 1), describer, sequences=["a"]).sequence_T.tolist() == [4]


def test_a_sequence_is_told_of_with_the_first_rows_that_are_kept():
    describer = Describer(lambda tag: tag)
    first = describe((2, 2), describer, keeps=lambda n: np.zeros(len(n), bool))
    assert first.begin == []
    assert first.batch.rows_N is None
    second = describe((2, 1), describer, going=after(first, 2), keeps=lambda n: n == 1)
    assert [x.sequence for x in second.begin] == [1]
    third = describe((2, 1), describer, going=after(first, 3))
    assert [x.sequence for x in third.begin] == [0]


def test_a_generation_repeats_each_of_the_users_rows():
    more = {"tags": ["x", "y"], "sequences": ["r", "s"], "keys": {"k": ["1", "2"]}}
    batch = describe((4, 1), going=Going(expand=2), padding=[1, 0], **more)
    assert batch.by_token == ["x", "x", "y", "y"]
    assert batch.sequence_T.tolist() == [0, 1, 2, 3]
    assert [x.request for x in batch.begin] == ["r", "r", "s", "s"]
    assert [x.keys["k"] for x in batch.begin] == ["1", "1", "2", "2"]
    assert batch.padding_T.tolist() == [False, False, True, True]


def test_cumulative_lengths_pack_sequences_into_one_row():
    keys = {"k": ["a", "b"]}
    more = {"sequences": torch.tensor([0, 2, 6]), "tags": ["x", "y"], "keys": keys}
    batch = describe((1, 6), **more)
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.position_N.tolist() == [0, 1, 0, 1, 2, 3]
    assert batch.by_token == ["x"] * 2 + ["y"] * 4
    assert batch.sequences_G.tolist() == [1, 1]
    assert [(x.sequence, x.tag, x.keys["k"]) for x in batch.begin] == [(0, "x", "a"), (1, "y", "b")]
    with pytest.raises(ValueError, match="end at 5, but this forward has 6"):
        describe((1, 6), sequences=[0, 2, 5])


def test_sequence_ids_per_token_pack_too():
    batch = describe((2, 3), sequences=[[7, 7, 8], [8, 9, 9]])
    assert batch.sequence_T.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.position_N.tolist() == [0, 1, 0, 0, 0, 1]
    assert [x.request for x in batch.begin] == ["7", "8", "8", "9"]


@pytest.mark.parametrize("as_tensor", [True, False])
def test_lengths_that_the_model_was_given_pack_too(as_tensor):
    lengths = [0, 2, 5]
    got = packed_lengths({"cu_seq_lens_q": torch.tensor(lengths) if as_tensor else lengths}, "main")
    batch = describe((1, 6), lengths=got, tags=["x", "y"])
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.position_N.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.padding_T.tolist() == [False] * 5 + [True]  # behind the last sequence
    assert batch.tokens_G.tolist() == [2, 3]


def test_lengths_on_a_device_say_what_lengths_on_the_host_say():
    for lengths, T in (([0, 2, 5], 6), ([0, 0, 4, 4, 7], 7), ([0, 3], 3)):
        lines = Describer(lambda tag: tag)._lines(len(lengths) - 1)
        host = owned_by_lengths(lines, np.array(lengths), T)
        device = owned_on_device(lines, torch.tensor(lengths, dtype=torch.int32), T)
        valid = np.arange(T) < lengths[-1]
        assert device.owner_T.numpy()[valid].tolist() == host.owner_T[valid].tolist()
        assert device.position_T.tolist() == host.position_T.tolist()
        assert device.beyond_T.tolist() == (~valid).tolist()


def test_positions_that_start_again_pack_unless_padding_explains_them():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert describe((1, 5), positions=packed).sequence_T.tolist() == [0, 0, 0, 1, 1]
    padded = torch.tensor([[0, 0, 0, 1, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert describe((1, 5), positions=padded, mask=mask).sequence_T.tolist() == [0] * 5
    draft = describe((1, 5), positions=padded, going=Going(cache=object(), past=3))
    assert draft.sequence_T.tolist() == [0] * 5


def test_positions_the_model_was_given_win():
    given = torch.tensor([[0, 0, 1], [0, 1, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert describe((2, 3), positions=given, mask=mask).position_N.tolist() == [0, 0, 1, 0, 1, 2]


def test_positions_are_counted_over_valid_tokens_on_either_side():
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert describe((2, 4), mask=left).position_N.tolist() == [0, 0, 0, 1, 0, 1, 2, 3]
    assert describe((2, 4), mask=left.flip(1)).position_N[:2].tolist() == [0, 1]
    # decoding: the mask covers the past
    whole = torch.cat([left, torch.ones(2, 1, dtype=torch.int64)], 1)
    assert describe((2, 1), mask=whole, going=Going(past=4)).position_N.tolist() == [2, 4]


def test_a_start_that_only_a_device_knows():
    going = Going(cache=object(), start=torch.tensor(7))
    assert describe((2, 2), going=going).position_N.tolist() == [7, 8, 7, 8]


def test_tokens_that_were_routed_before_are_in_no_count_and_have_no_rows():
    batch = describe((2, 4), going=Going(again=3))
    assert batch.tokens_G.tolist() == [2]
    assert batch.token_N.tolist() == [3, 7]
    assert batch.position_N.tolist() == [3, 3]
    assert batch.padding_T.reshape(2, 4).tolist() == [[True] * 3 + [False]] * 2


def test_rows_of_padding_are_no_sequences():
    mask = torch.tensor([[0, 0], [1, 0], [1, 1]])
    assert describe((3, 2), mask=mask, tags=["x", "y", "y"]).sequences_G.tolist() == [0, 2]
    assert describe((3, 2)).sequences_G.tolist() == [3]


def test_a_sequence_has_the_tag_of_its_first_valid_token():
    tags = [["x", "y", "y"], ["y", "x", "x"]]
    batch = describe((2, 3), tags=tags)
    assert batch.batch.tags == ["x", "y"]
    assert batch.sequences_G.tolist() == [1, 1]
    assert [x.tag for x in batch.begin] == ["x", "y"]
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert describe((2, 3), tags=tags, mask=left).sequences_G.tolist() == [0, 2]


def test_padding_as_mask_lengths_or_nothing():
    mask = torch.tensor([[True, False], [False, False]])
    for padding in (mask, mask.tolist(), mask.numpy()):
        batch = describe((2, 2), padding=padding)
        assert batch.padding_T.tolist() == [True, False, False, False]
        assert batch.tokens_G.tolist() == [3]


def test_padding_lengths_are_of_valid_tokens_and_false_overrules_the_mask():
    def padded(padding):
        mask = torch.zeros(2, 3)
        return describe((2, 3), mask=mask, padding=padding).padding_T

    assert padded([1, 3]).tolist() == [False, True, True, False, False, False]
    assert padded(False) is None
    assert padded(None).all()


def test_attention_mask_of_decoding_covers_the_past_too():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert padding_from_mask(mask, 2, 1).tolist() == [[False], [False]]
    assert padding_from_mask(mask, 2, 4).tolist()[0] == [True, False, False, False]
    assert padding_from_mask(mask, 3, 4) is None
    assert padding_from_mask("sdpa", 2, 4) is None
    assert padding_from_mask(torch.empty(2, 1, 4, 4, device="meta"), 2, 4) is None


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("room", [0, 5])
def test_a_mask_for_each_query_tells_padding_on_its_diagonal(additive, past, room):
    valid = torch.tensor([[False, False, True, True], [True, True, True, False]])
    keys = torch.cat([torch.ones(2, past, dtype=torch.bool), valid], 1)
    causal = torch.ones(4, past + 4, dtype=torch.bool).tril(past)
    mask = causal[None, None] & keys[:, None, None]
    mask = torch.nn.functional.pad(mask, (0, room))  # a static cache has room for more
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert (padding_from_mask(mask, 2, 4, past) == ~valid).all()
    assert (
        padding_from_mask({"sliding": None, "full_attention": mask}, 2, 4, past) == ~valid
    ).all()
    assert padding_from_mask(mask, 2, 3, past) is None


def test_a_block_that_is_fed_one_flat_row_does_not_hide_the_batch():
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64)}
    assert batch_shape(inputs, "main", (1, 12), 12, "bs") == (2, 6)
    assert batch_shape(inputs, "main", (12, 1), 12, "sb") == (2, 6)
    assert batch_shape(inputs, "main", (2, 3), 6, "bs") == (2, 3)
    assert batch_shape(inputs, "main", None, 12, "bs") == (2, 6)
    assert batch_shape(inputs, "main", None, 5, "bs") == (1, 5)
    assert batch_shape({}, "main", (6, 2), 12, "sb") == (2, 6)


def test_caches_say_how_long_they_are():
    class Linear:
        def get_seq_length(self):
            raise ValueError("no attention layer")

    keys = torch.zeros(1, 2, 5, 4)
    assert cached_length(None) is None
    assert cached_length(Linear()) is None
    assert cached_length(((keys, keys),)) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tags": ["x", "y", "z"]}, "tags has 3 values, but this forward has 2 sequences"),
        ({"tags": [["x"], ["y"]]}, r"tags has shape \[2, 1\]"),
        ({"tags": [["x"], ["y", "z"]]}, "tags is ragged: its rows have 1, 2 values"),
        ({"tags": ["x", ["y"]]}, "tags is ragged: its rows have 'x', 1 values"),
        ({"sequences": ["a"]}, r"sequences has shape \[1\]"),
        ({"padding": torch.zeros(3, 2, dtype=torch.bool)}, r"padding has shape \[3, 2\]"),
        ({"keys": {"k": ["a"]}}, r"keys\['k'\] has 1 values, but this forward has 2 sequences"),
        ({"keys": {"k": torch.zeros(3)}}, r"keys\['k'\] has 3 values"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused_with_both_sizes(given, message):
    with pytest.raises(ValueError, match=message):
        describe((2, 2), **given)


def test_one_value_of_a_key_is_that_of_every_sequence():
    batch = describe((2, 1), keys={"k": "english", "n": torch.tensor([1, 2])})
    assert [x.keys for x in batch.begin] == [{"k": "english", "n": "1"}, {"k": "english", "n": "2"}]
    with pytest.raises(ValueError, match="were not declared"):
        said(None, None, None, None, {"k": "v"}, declared=["other"])


def test_an_empty_batch_is_described():
    batch = describe((2, 0), tags=["x", "y"])
    assert batch.batch.size == 0
    assert batch.batch.rows_N is None
    assert int(batch.tokens_G.sum()) == 0
    assert batch.begin == []
