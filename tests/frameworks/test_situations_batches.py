"""Padding on either side, masks of all kinds, packed sequences: each token in its sequence."""

from __future__ import annotations

import pytest
import torch
from support.generated import Traced, load_of, routed_to, watched
from support.models import VOCAB, TinyBlock, build
from torch import nn

import moe_lens

LENGTHS = [4, 7, 2]
TEXTS = [list(range(10 * i + 3, 10 * i + 3 + n)) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model():
    return build("olmoe")


def padded(side):
    """The texts as one batch, and its mask."""
    S = max(LENGTHS)
    ids, mask = torch.zeros(3, S, dtype=torch.int64), torch.zeros(3, S, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        at = slice(0, len(text)) if side == "right" else slice(S - len(text), S)
        ids[row, at], mask[row, at] = torch.tensor(text), 1
    return ids, mask


def four(mask, additive):
    """A mask for each query, as a user hands it over: causal, no key is padding."""
    S = mask.shape[1]
    attend = torch.ones(S, S, dtype=torch.bool).tril() & mask[:, None, None].bool()
    if not additive:
        return attend
    return torch.zeros(attend.shape).masked_fill(~attend, torch.finfo(torch.float32).min)


def record(model, run, *args, tags=None, sequences=None, padding=None, **kwargs):
    with moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec, watched(model) as ran:
        with torch.no_grad(), rec.step(tags=tags, sequences=sequences, padding=padding):
            model(*args, **kwargs)
    return Traced(run), ran


def texts_of(traced):
    """Kept tokens as texts, in the order of their sequences; positions from 0, none left out."""
    out = []
    for _, of in sorted(traced.by_sequence().items()):
        assert sorted(of) == list(range(len(of)))
        out.append([of[p] for p in range(len(of))])
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["2-D", "4-D bool", "4-D additive", "said", "lengths"])
def test_padding(model, tmp_path, side, form):
    ids, mask = padded(side)
    given = {"attention_mask": mask}
    said = {}
    if form.startswith("4-D"):
        given = {"attention_mask": four(mask, "additive" in form)}
    elif form == "said":
        given, said = {}, {"padding": mask == 0}
    elif form == "lengths":
        if side == "left":
            pytest.skip("lengths say padding on the right")
        given, said = {}, {"padding": LENGTHS}
    traced, ran = record(model, tmp_path / "run", input_ids=ids, **given, **said)
    assert texts_of(traced) == TEXTS
    assert load_of(traced) == routed_to(ran, [mask.bool()])
    assert traced.steps.padding_tokens.tolist() == [int((mask == 0).sum())]
    assert traced.tokens.padding.tolist() == (mask == 0).flatten().tolist()


class Flat(nn.Module):
    """Feeds its MoE block all tokens as one row."""

    def __init__(self):
        super().__init__()
        self.embed, self.mlp = nn.Embedding(VOCAB, 8), TinyBlock()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return x + self.mlp(x.reshape(1, -1, 8)).view_as(x)


def test_a_block_that_is_fed_one_row_keeps_the_mask(tmp_path):
    ids, mask = padded("left")
    traced, ran = record(Flat(), tmp_path / "run", ids, attention_mask=mask, tags=["a", "b", "c"])
    assert texts_of(traced) == TEXTS
    assert traced.sequences.tag.tolist() == ["a", "b", "c"]
    assert load_of(traced) == routed_to(ran, [mask.bool()])


def test_rows_of_padding_are_no_sequences(model, tmp_path):
    ids, mask = padded("left")
    mask[1] = 0
    record(model, tmp_path / "run", input_ids=ids, attention_mask=mask, tags="x")
    trace = moe_lens.open(tmp_path / "run")
    assert trace.sql("select sequences, tokens from slices").rows() == [
        {"sequences": 2, "tokens": 6}
    ]


def collated(**options):
    from transformers import DataCollatorWithFlattening

    batch = DataCollatorWithFlattening(**options)([{"input_ids": text} for text in TEXTS])
    return {k: v for k, v in batch.items() if k != "labels"}


@pytest.mark.parametrize("form", ["positions", "lengths", "said", "both"])
def test_packed_sequences(model, tmp_path, form):
    """Pitfall 16: texts in one row are sequences of their own, whoever says where they begin."""
    batch = collated(return_flash_attn_kwargs=form in ("lengths", "both"))
    said = {}
    if form == "lengths":
        batch.pop("position_ids")
    if form == "said":
        batch.pop("position_ids")
        said = {"sequences": [0, 4, 11, 13]}
    traced, ran = record(model, tmp_path / "run", tags=["a", "b", "c"], **batch, **said)
    assert ran[0].token_ids_BS.shape == (1, 13)
    assert texts_of(traced) == TEXTS
    assert traced.sequences.tag.tolist() == ["a", "b", "c"]
    by_tag = traced.load.groupby("tag").routed.sum()
    assert by_tag.to_dict() == {t: n * 2 * 3 for t, n in zip("abc", LENGTHS, strict=True)}


def test_packed_rows_of_a_batch(model, tmp_path):
    """Two rows, each of packed sequences, told by positions that start again."""
    ids = torch.arange(3, 15).reshape(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    traced, _ = record(model, tmp_path / "run", input_ids=ids, position_ids=positions)
    assert texts_of(traced) == [[3, 4, 5], [6, 7, 8], [9, 10, 11, 12], [13, 14]]


def test_a_packed_text_is_routed_as_the_text_alone(model, tmp_path):
    batch = collated(return_flash_attn_kwargs=True)
    packed, _ = record(model, tmp_path / "packed", **batch, use_cache=False)
    for number, text in enumerate(TEXTS):
        alone, _ = record(model, tmp_path / f"alone{number}", input_ids=torch.tensor([text]))
        a = experts_by_position(packed, number)
        assert a == experts_by_position(alone, 0)


def experts_by_position(traced, sequence):
    tokens = traced.tokens[traced.tokens.sequence == sequence]
    rows = traced.routing.merge(tokens[["ran", "token", "position"]], on=["ran", "token"])
    return {(r.layer, r.position): sorted(r.expert_ids) for r in rows.itertuples()}
