"""`generate` in its modes: each token once, at its place in its sequence, with what experts got."""

from __future__ import annotations

import pytest
import torch
from support.generated import Traced, load_of, routed_to, same_experts, watched
from support.models import VOCAB, build

import moe_lens

PROMPT = 9


@pytest.fixture(scope="module")
def model():
    model = build("mixtral")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(1)
    return torch.randint(3, VOCAB, (2, PROMPT))


def generate(model, run, prompts, *, stepped=True, tags=None, **options):
    """Generate while recording; the trace, what ran, and the returned sequences."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    kwargs = {"tokens": 1.0, "token_ids": True, "weights": "exact"}
    with torch.no_grad(), moe_lens.record(model, run, **kwargs) as rec, watched(model) as ran:
        if stepped:
            with rec.step(tags=tags):
                out = model.generate(prompts, **options)
        else:
            out = model.generate(prompts, **options)
    return Traced(run), ran, out


def rows_are(traced, out, starts):
    """Kept tokens are the returned sequences, but for the token that was chosen last."""
    got = traced.by_sequence()
    assert len(got) == len(out)
    for (_, of), row, start in zip(sorted(got.items()), out.tolist(), starts, strict=True):
        text = row[start:]
        assert of == dict(enumerate(text[:-1]))


@pytest.mark.parametrize("stepped", [True, False])
def test_greedy(model, prompts, tmp_path, stepped):
    traced, ran, out = generate(model, tmp_path / "run", prompts, stepped=stepped)
    assert [r.token_ids_BS.shape[1] for r in ran] == [PROMPT, 1, 1, 1, 1, 1]
    rows_are(traced, out, [0, 0])
    assert same_experts(traced, ran) == 3 * 2 * (PROMPT + 5)
    assert traced.steps.phase.tolist() == ["prefill"] + ["decode"] * 5
    assert len(traced.sequences) == 2
    assert traced.outcomes.empty
    valid = [torch.ones_like(r.token_ids_BS, dtype=torch.bool) for r in ran]
    assert load_of(traced) == routed_to(ran, valid)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding(model, prompts, tmp_path, cache):
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    traced, ran, out = generate(
        model,
        tmp_path / "run",
        prompts.masked_fill(mask == 0, 0),
        attention_mask=mask,
        cache_implementation=cache,
        disable_compile=True,
    )
    rows_are(traced, out, [0, 4])
    padding = traced.tokens[traced.tokens.padding]
    assert sorted(padding.token) == [PROMPT, PROMPT + 1, PROMPT + 2, PROMPT + 3]
    valid = [mask.bool(), *(torch.ones(2, 1, dtype=torch.bool) for _ in ran[1:])]
    assert load_of(traced) == routed_to(ran, valid)
    assert traced.steps.padding_tokens.tolist() == [4, 0, 0, 0, 0, 0]
    same_experts(traced, ran)


def test_without_a_cache_old_tokens_are_not_counted_again(model, prompts, tmp_path):
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0
    options = {"use_cache": False, "attention_mask": mask}
    traced, ran, out = generate(model, tmp_path / "run", prompts, **options)
    assert [r.token_ids_BS.shape[1] for r in ran] == [PROMPT + i for i in range(6)]
    rows_are(traced, out, [2, 0])
    same_experts(traced, ran)
    assert len(traced.routing) == 3 * (2 * PROMPT + 2 * 5)  # each token once
    valid = [mask.bool()]
    for r in ran[1:]:
        new = torch.zeros_like(r.token_ids_BS, dtype=torch.bool)
        new[:, -1] = True
        valid.append(new)
    assert load_of(traced) == routed_to(ran, valid)
    assert traced.steps.phase.tolist() == ["prefill"] + ["decode"] * 5
    assert traced.steps.padding_tokens.tolist() == [2] + [2 * (PROMPT + i) for i in range(5)]
    assert traced.steps.tokens.tolist() == [2 * PROMPT - 2, *[2] * 5]


def test_after_a_generation_without_a_cache_a_forward_is_a_new_batch(model, prompts, tmp_path):
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            out = model.generate(prompts, use_cache=False, max_new_tokens=2, do_sample=False)
        with rec.step():
            model(out)
    traced = Traced(run)
    assert traced.steps.tokens.tolist() == [2 * PROMPT, 2, 2 * (PROMPT + 2)]
    assert traced.steps.phase.tolist() == ["prefill", "decode", "eval"]
    assert len(traced.sequences) == 4


def test_chunked_prefill(model, prompts, tmp_path):
    traced, ran, out = generate(model, tmp_path / "run", prompts, prefill_chunk_size=4)
    assert [r.token_ids_BS.shape[1] for r in ran] == [4, 4, 1, 1, 1, 1, 1, 1]
    rows_are(traced, out, [0, 0])
    same_experts(traced, ran)
    assert traced.steps.phase.tolist() == ["prefill"] * 3 + ["decode"] * 5


def test_returned_sequences_are_sequences_of_their_own(model, prompts, tmp_path):
    torch.manual_seed(0)
    traced, ran, out = generate(
        model,
        tmp_path / "run",
        prompts,
        tags=["code", "prose"],
        do_sample=True,
        num_return_sequences=3,
    )
    rows_are(traced, out, [0] * 6)
    assert traced.sequences.tag.tolist() == ["code"] * 3 + ["prose"] * 3
    assert len({tuple(row) for row in out.tolist()}) > 2
    same_experts(traced, ran)


def test_two_generations_in_turn_keep_their_sequences_apart(model, prompts, tmp_path):
    """A user's own loop: caches of two batches, forwards in turn, the model makes the caches."""
    run = tmp_path / "run"
    texts = [prompts, prompts.flip(0)[:, :5]]
    caches = [None, None]
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            for turn in range(3):
                for i in range(2):
                    given = texts[i] if turn == 0 else texts[i][:, -1:]
                    got = model(given, past_key_values=caches[i], use_cache=True)
                    caches[i] = got.past_key_values
                    texts[i] = torch.cat([texts[i], got.logits[:, -1:].argmax(-1)], 1)
    traced = Traced(run)
    expected = [row[:-1] for text in texts for row in text.tolist()]
    got = traced.by_sequence()
    assert [list(of.values()) for _, of in sorted(got.items())] == expected
    assert all(list(of) == list(range(len(of))) for of in got.values())
    assert traced.steps.phase.tolist() == ["eval"] * 2 + ["decode"] * 4


def test_a_copied_cache_holds_other_sequences(model, prompts, tmp_path):
    """A prompt that is read once and gone on with twice."""
    import copy

    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            cache = model(prompts, use_cache=True).past_key_values
            for token in (7, 8):
                model(torch.full((2, 1), token), past_key_values=copy.deepcopy(cache))
    traced = Traced(run)
    after = traced.tokens[traced.tokens.ran > 0]
    assert after.position.tolist() == [PROMPT] * 4
    assert after.sequence.tolist() == [2, 3, 4, 5]
    assert traced.outcomes.empty


def test_a_cache_that_is_reset_begins_anew(model, prompts, tmp_path):
    from transformers import StaticCache

    run = tmp_path / "run"
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec, rec.step():
        for _ in range(2):
            model(prompts, past_key_values=cache)
            model(prompts[:, :1], past_key_values=cache)
            cache.reset()
    tokens = Traced(run).tokens
    assert tokens.groupby("sequence").size().tolist() == [PROMPT + 1] * 4
    assert tokens.groupby("sequence").position.max().tolist() == [PROMPT] * 4


def test_recording_leaves_nothing_behind(model, prompts, tmp_path):
    from transformers import GenerationMixin
    from transformers.cache_utils import Cache

    names = [(Cache, n) for n in ("crop", "reorder_cache", "reset")]
    names += [(GenerationMixin, n) for n in ("_sample", "_beam_search", "_prefill")]
    before = [vars(cls)[name] for cls, name in names]
    with moe_lens.record(model, tmp_path / "run", tokens=0.0) as rec, rec.step():
        with torch.no_grad():
            recorded = model.generate(prompts, max_new_tokens=3, do_sample=False)
        during = [vars(cls)[name] for cls, name in names]
    assert all(a is not b for a, b in zip(before, during, strict=True))
    assert all(a is vars(cls)[name] for a, (cls, name) in zip(before, names, strict=True))
    with torch.no_grad():
        assert torch.equal(recorded, model.generate(prompts, max_new_tokens=3, do_sample=False))
