"""Speculative decoding: rejected drafts end as not kept, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from support.generated import Traced, same_experts, watched
from support.models import VOCAB, build

import moe_lens

PROMPT = 8


@pytest.fixture(scope="module")
def model():
    model = build("mixtral")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompt():
    torch.manual_seed(3)
    part = torch.randint(3, VOCAB, (1, 3))
    return torch.cat([part, torch.tensor([[40]]), part, torch.tensor([[41]])], 1)


def generate(model, run, prompt, **options):
    options = {"max_new_tokens": 12, "do_sample": False} | options
    kwargs = {"tokens": 1.0, "token_ids": True, "weights": "exact"}
    with torch.no_grad(), moe_lens.record(model, run, **kwargs) as rec, watched(model) as ran:
        with rec.step():
            out = model.generate(prompt, **options)
    return Traced(run), ran, out


def check(traced, ran, out):
    """Kept tokens are the returned sequence; all others that ran are rejected, by name."""
    text = out[0].tolist()
    assert traced.by_sequence() == {0: dict(enumerate(text[:-1]))}
    routed = sum(r.token_ids_BS.numel() for r in ran)
    assert len(traced.tokens) == routed
    assert len(traced.rejected) == routed - (len(text) - 1)
    # by hand: a token that ran at a position is kept if the text has it there, once
    for row in traced.tokens.itertuples():
        lost = (row.step, row.forward, row.sequence, row.position) in traced.rejected
        assert ran[row.ran].token_ids_BS[0, row.token] == row.token_id
        if not lost:
            assert text[row.position] == row.token_id
    assert same_experts(traced, ran) == 3 * routed
    return len(traced.rejected)


def test_prompt_lookup(model, prompt, tmp_path):
    traced, ran, out = generate(model, tmp_path / "run", prompt, prompt_lookup_num_tokens=3)
    assert len(ran) < 12 or any(r.token_ids_BS.shape[1] > 1 for r in ran[1:])
    assert check(traced, ran, out) > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_assisted_by_another_model(model, prompt, tmp_path, seed):
    """The assistant is another model, which nobody records."""
    assistant = build("mixtral", seed=seed)
    assistant.generation_config.eos_token_id = None
    traced, ran, out = generate(model, tmp_path / "run", prompt, assistant_model=assistant)
    assert check(traced, ran, out) > 0
    with torch.no_grad():
        plain = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, plain)


def test_accepted_drafts_are_not_marked(model, prompt, tmp_path):
    """An assistant that always guesses right: the same weights."""
    assistant = build("mixtral")
    assistant.generation_config.eos_token_id = None
    traced, ran, out = generate(model, tmp_path / "run", prompt, assistant_model=assistant)
    assert len(ran) < 8
    assert check(traced, ran, out) == 0


def test_an_assistant_is_recorded_apart(model, prompt, tmp_path):
    assistant = build("mixtral", seed=1)
    assistant.generation_config.eos_token_id = None
    with moe_lens.record(assistant, tmp_path / "draft", tokens=1.0, token_ids=True) as rec:
        with rec.step(), watched(assistant) as drafted:
            traced, ran, out = generate(model, tmp_path / "run", prompt, assistant_model=assistant)
    check(traced, ran, out)
    draft = Traced(tmp_path / "draft")
    text = out[0].tolist()
    kept = draft.by_sequence()[0]
    # what the assistant's cache held in the end stands in the text, but for its last guesses
    assert sorted(kept) == list(range(len(kept)))
    agree = [token == text[p] for p, token in kept.items() if p < len(text)]
    assert sum(agree) >= len(agree) - 1
    assert len(draft.tokens) == sum(r.token_ids_BS.numel() for r in drafted)


def test_a_model_that_drafts_for_itself(model, prompt, tmp_path):
    """Its first layers guess: what they routed is of no text that was returned."""
    traced, ran, out = generate(model, tmp_path / "run", prompt, assistant_early_exit=1)
    text = out[0].tolist()
    drafting = 0  # what ran first
    assert traced.by_sequence() == {1: dict(enumerate(text[:-1]))}
    own = traced.tokens[traced.tokens.sequence == drafting]
    assert len({k for k in traced.rejected if k[2] == drafting}) == len(own) > 0
    early = [i for i, r in enumerate(ran) if len(r.experts) == 1]
    assert sorted(own.ran.unique()) == early


def test_a_users_own_crop(model, prompt, tmp_path):
    """Three guesses of which one is right; rows are sampled, padding is no token."""
    run = tmp_path / "run"
    batch = torch.cat([prompt, prompt.flip(1)])
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
            drafts = torch.tensor([[5, 6, 7], [8, 9, 10]])
            more = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
            model(drafts, attention_mask=more, past_key_values=cache)
            cache.crop(-2)
            model(drafts[:, 1:2] + 20, attention_mask=more[:, :-1], past_key_values=cache)
    traced = Traced(run)
    P = PROMPT
    assert traced.rejected == {
        (0, 1, 0, P + 1), (0, 1, 0, P + 2), (0, 1, 1, P - 1), (0, 1, 1, P),
    }  # fmt: skip
    got = traced.by_sequence()
    assert got[0] == dict(enumerate([*prompt[0].tolist(), 5, 26]))
    assert got[1] == dict(enumerate([*prompt.flip(1)[0, 2:].tolist(), 8, 29]))


def test_a_cache_that_was_cut_without_crop_is_found_at_the_next_forward(model, prompt, tmp_path):
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            cache = model(prompt, use_cache=True).past_key_values
            model(torch.tensor([[5, 6]]), past_key_values=cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
            model(torch.tensor([[7]]), past_key_values=cache)
    traced = Traced(run)
    assert traced.rejected == {(0, 1, 0, PROMPT + 1)}
    assert traced.by_sequence()[0] == dict(enumerate([*prompt[0].tolist(), 5, 7]))
