"""Beam search: rows change their sequence between forwards, and only what is returned was kept."""

from __future__ import annotations

import pytest
import torch
from support.generated import Traced, same_experts, watched
from support.models import VOCAB, build, switch

import moe_lens

PROMPT = 6


@pytest.fixture(scope="module")
def model():
    model = build("mixtral")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(5)
    return torch.randint(3, VOCAB, (2, PROMPT))


def generate(model, run, prompts, tags=None, **options):
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0} | options
    kwargs = {"tokens": 1.0, "token_ids": True, "weights": "exact"}
    with torch.no_grad(), moe_lens.record(model, run, **kwargs) as rec, watched(model) as ran:
        with rec.step(tags=tags):
            out = model.generate(prompts, **options)
    return Traced(run), ran, out


def trie(texts):
    """All beginnings of the texts, without the token of each that was chosen last."""
    return {tuple(text[:n]) for text in texts for n in range(1, len(text))}


def rows_by_hand(ran, reorders):
    """The text in each row after each forward, from the ids that ran and what was reordered."""
    texts, after = [[] for _ in range(ran[0].token_ids_BS.shape[0])], []
    for at, forward in enumerate(ran):
        if at:
            texts = [list(texts[i]) for i in reorders[at - 1]]
        texts = [t + ids for t, ids in zip(texts, forward.token_ids_BS.tolist(), strict=True)]
        after.append(texts)
    return after


@pytest.fixture
def reorders(monkeypatch):
    """What the cache was told to reorder, seen beneath moe_lens."""
    from transformers.cache_utils import Cache

    seen = []
    original = Cache.reorder_cache

    def noted(self, beam_idx):
        seen.append(beam_idx.tolist())
        return original(self, beam_idx)

    monkeypatch.setattr(Cache, "reorder_cache", noted)
    return seen


@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ],
    ids=["dynamic", "static", "chunks"],
)
def test_only_returned_beams_are_kept(model, prompts, tmp_path, returned, options):
    traced, ran, out = generate(
        model,
        tmp_path / "run",
        prompts,
        num_return_sequences=returned,
        **options,
    )
    assert traced.prefixes() == trie(out.tolist())
    routed = sum(r.token_ids_BS.numel() for r in ran)
    assert len(traced.tokens) == routed
    assert len(traced.rejected) == routed - len(traced.kept)
    assert same_experts(traced, ran) == 3 * routed
    if returned == 1:
        assert len(traced.kept) == 2 * (PROMPT + 7)


def test_each_row_is_the_text_that_it_goes_on_with(model, prompts, tmp_path, reorders):
    """Every token, kept or not: the tokens before it in its sequence are those of its row."""
    traced, ran, _ = generate(model, tmp_path / "run", prompts)
    after = rows_by_hand(ran, reorders)
    texts: dict[tuple[int, int], int] = {}
    tokens = traced.tokens.sort_values(["ran", "token"])
    for row in tokens.itertuples():
        texts[row.sequence, row.position] = row.token_id
    parent = traced.sequences.parent

    def before(sequence, position):
        if position < 0:
            return []
        while (sequence, position) not in texts:
            sequence = int(parent[sequence])
        return [*before(sequence, position - 1), texts[sequence, position]]

    for row in tokens.itertuples():
        S = ran[row.ran].token_ids_BS.shape[1]
        at = row.token // S
        expected = after[row.ran][at][: len(after[row.ran][at]) - S + row.token % S + 1]
        assert before(row.sequence, row.position) == expected
    assert parent.notna().any()


def test_a_beam_that_ended_early_and_won_is_kept(model, prompts, tmp_path):
    """Its rows left the running beams when it ended; that alone does not supersede it."""
    early = 0
    for eos in range(3, VOCAB, 4):
        run = tmp_path / f"run{eos}"
        traced, _, out = generate(
            model, run, prompts, eos_token_id=eos, pad_token_id=1, length_penalty=-1.0
        )
        texts = [row[: row.index(eos) + 1] if eos in row[PROMPT:] else row for row in out.tolist()]
        ended = [len(t) < PROMPT + 8 for t in texts]
        early += any(ended)
        assert traced.prefixes() == trie(texts)
        if early >= 2:
            break
    assert early >= 2


def test_forks_are_sampled_with_what_they_fork_from(model, tmp_path):
    torch.manual_seed(5)
    prompts = torch.randint(3, VOCAB, (12, PROMPT))
    run = tmp_path / "run"
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), moe_lens.record(model, run, tokens=0.5, token_ids=True) as rec:
        with rec.step(tags=[f"p{i}" for i in range(12)]):
            model.generate(prompts, **options)
    traced = Traced(run)
    forks = traced.sequences[traced.sequences.parent.notna()]
    assert len(forks) > 0
    assert set(forks.parent.astype(int)) <= set(traced.sequences.index)
    assert all(forks.tag == traced.sequences.tag[forks.parent.astype(int)].tolist())
    assert traced.tokens.sequence.nunique() == len(traced.sequences)


def test_beams_without_a_cache_are_refused_by_name(model, prompts, tmp_path):
    with pytest.raises(moe_lens.CaptureBreach, match=r"beam search reorders its rows.*no cache"):
        generate(model, tmp_path / "run", prompts, use_cache=False)


def test_a_cache_that_nobody_sees_reordered_is_refused(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(model), "_reorder_cache", lambda self, cache, beam: cache, raising=False
    )
    with pytest.raises(moe_lens.CaptureBreach, match="DynamicCache was not seen to be reordered"):
        generate(model, tmp_path / "run", prompts)


def test_a_users_own_beams(model, prompts, tmp_path):
    """Superseded as soon as no row goes on with them."""
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            cache = model(prompts[:1], use_cache=True).past_key_values
            cache.batch_repeat_interleave(3)
            model(torch.tensor([[10], [11], [12]]), past_key_values=cache)
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            model(torch.tensor([[20], [21], [22]]), past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1]))
            model(torch.tensor([[30]]), past_key_values=cache)
    traced = Traced(run)
    text = prompts[0].tolist()
    assert traced.prefixes() == trie([[*text, 12, 21, 30, 0]])
    lost = traced.tokens.merge(
        traced.outcomes, on=["step", "forward", "sequence", "position"], suffixes=("", "_o")
    )
    assert sorted(lost.token_id) == [10, 11, 20, 22]


def test_a_cache_with_other_rows_is_a_breach_unless_they_are_named(model, prompts, tmp_path):
    def go_on(run, names):
        with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
            cache = model(prompts, use_cache=True).past_key_values
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:1], layer.values[:1]
            with rec.step(sequences=names):
                model(prompts[:1, :1], past_key_values=cache)

    with pytest.raises(moe_lens.CaptureBreach, match=r"held 2 rows.*has 1.*rec.step"):
        go_on(tmp_path / "a", None)
    go_on(tmp_path / "b", ["mine"])
    tokens = Traced(tmp_path / "b").tokens
    assert tokens[tokens.ran == 1].position.tolist() == [PROMPT]


def test_encoder_decoder_beams_and_padding(tmp_path):
    model = switch(capacity=64)
    model.generation_config.eos_token_id = None
    torch.manual_seed(1)
    ids = torch.randint(2, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    run = tmp_path / "run"
    options = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step(tags=["code", "prose"]):
            out = model.generate(ids, attention_mask=mask, **options)
    traced = Traced(run)
    encoder = traced.tokens[traced.tokens.stream == "encoder"]
    assert encoder.padding.tolist() == (mask == 0).flatten().tolist()
    assert encoder.tag.tolist() == ["code"] * 7 + ["prose"] * 7
    traced.tokens = traced.tokens[traced.tokens.stream == "decoder"]
    assert traced.prefixes() == trie(out.tolist())


def test_a_decoder_goes_on_with_the_sequences_of_its_encoder(tmp_path):
    model = switch(capacity=64)
    model.generation_config.eos_token_id = None
    torch.manual_seed(1)
    ids = torch.randint(2, VOCAB, (2, 7))
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, token_ids=True) as rec:
        with rec.step():
            out = model.generate(ids, max_new_tokens=4, do_sample=False)
        with rec.step():
            model(input_ids=ids, decoder_input_ids=out)
    traced = Traced(run)
    assert traced.sequences.index.tolist() == [0, 1, 2, 3]
    tokens = traced.tokens
    generated = tokens[(tokens.stream == "decoder") & (tokens.step == 0)]
    rows = generated.sort_values(["sequence", "position"])
    assert rows.sequence.tolist() == [0] * 4 + [1] * 4
    assert rows.token_id.tolist() == out[:, :-1].flatten().tolist()
    forced = tokens[tokens.step == 1].groupby("stream").sequence.unique()
    assert forced.map(sorted).tolist() == [[2, 3], [2, 3]]
