"""Recording that is stopped and started in the middle of generations: whose tokens, and where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.generated import Traced, watched
from support.models import build, switch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import moe_lens

PROMPTS = torch.randint(1, 96, (2, 5), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model():
    return build("mixtral")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


class Switching(LogitsProcessor):
    """Starts or stops the recorder after the n-th forward of a generation (from 1)."""

    def __init__(self, rec, at):
        self.rec, self.at, self.n = rec, at, 0

    def __call__(self, input_ids, scores):
        self.n += 1
        if self.n in self.at:
            (self.rec.start if self.at[self.n] else self.rec.stop)()
        return scores


def generate(model, rec, at, **options):
    """A generation in which recording is switched; the forwards that ran."""
    given = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    with watched(model) as forwards, torch.no_grad():
        model.generate(
            PROMPTS,
            attention_mask=MASK,
            logits_processor=LogitsProcessorList([Switching(rec, at)]),
            **given | options,
        )
    return list(forwards)


def rows_of(run):
    """(sequence, position) to the ids of each layer, and how many rows there are."""
    t = Traced(run)
    rows = t.routing.merge(t.tokens, on=["step", "forward", "token"], suffixes=("", "_t"))
    rows = rows[~rows.padding]
    keys = zip(rows.sequence, rows.position, rows.layer, strict=True)
    return {key: np.sort(ids).tolist() for key, ids in zip(keys, rows.expert_ids, strict=True)}, t


def whole(model, tmp_path, **options):
    """The same generation, recorded from its beginning to its end."""
    with moe_lens.record(model, tmp_path / "whole", tokens=1.0) as rec:
        generate(model, rec, {}, **options)
    return rows_of(tmp_path / "whole")[0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_stopped_and_started_in_a_generation(model, run, tmp_path, use_cache):
    truth = whole(model, tmp_path, use_cache=use_cache)
    with moe_lens.record(model, run, tokens=1.0) as rec:
        forwards = generate(model, rec, {2: False, 4: True}, use_cache=use_cache)
    assert len(forwards) == 7
    found, t = rows_of(run)
    assert t.steps.step.tolist() == [0, 1, 4, 5, 6]
    # the same sequences go on, and the positions are those of the whole
    lengths = MASK.sum(1).tolist()
    missed = {(b, n + i) for b, n in enumerate(lengths) for i in (1, 2)} if use_cache else set()
    assert found == {key: ids for key, ids in truth.items() if key[:2] not in missed}


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_that_began_while_paused(model, run, tmp_path, use_cache):
    truth = whole(model, tmp_path, use_cache=use_cache)
    with moe_lens.record(model, run, tokens=1.0, paused=True) as rec:
        generate(model, rec, {3: True}, use_cache=use_cache)
    found, t = rows_of(run)
    assert t.steps.step.tolist() == [3, 4, 5, 6]
    lengths = MASK.sum(1).tolist()
    seen = {(b, n + i) for b, n in enumerate(lengths) for i in (2, 3, 4, 5)}
    assert found == {k: ids for k, ids in truth.items() if not use_cache or k[:2] in seen}
    assert sorted(t.sequences.index) == [0, 1]


@pytest.mark.parametrize(("paused", "at"), [(False, {2: False}), (True, {2: True})])
def test_a_beam_search_ends_as_it_began(model, run, paused, at):
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5}
    with moe_lens.record(model, run, tokens=1.0, paused=paused) as rec:
        forwards = generate(model, rec, at, **options)
        with torch.no_grad():
            model(PROMPTS)  # the switch is taken here
            if not paused:
                rec.start()
            model(PROMPTS)
    steps = Traced(run).steps
    n = len(forwards)
    expected = [*range(n), n + 1] if not paused else [n, n + 1]
    assert steps.step.tolist() == expected
    assert not steps.breaches.any()


def decode(model, cache, ids, past):
    mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)


def test_a_cache_that_is_emptied_and_refilled_while_paused_is_of_others(model, run):
    class Emptied(DynamicCache):
        """Says nothing when it is emptied."""

        def empty(self):
            self.layers = DynamicCache(config=model.config).layers

    cache = Emptied(config=model.config)
    with moe_lens.record(model, run, tokens=1.0) as rec:
        decode(model, cache, PROMPTS, 0)  # 0
        rec.stop()
        cache.empty()
        decode(model, cache, PROMPTS, 0)  # 1
        decode(model, cache, PROMPTS[:, :2], 5)  # 2
        rec.start()
        decode(model, cache, PROMPTS[:, :1], 7)  # 3
    t = Traced(run)
    last = t.tokens[t.tokens.step == 3]
    assert last.position.tolist() == [7, 7]
    assert set(last.sequence).isdisjoint(t.tokens[t.tokens.step == 0].sequence)


def test_a_cache_that_is_cropped_and_reordered_while_paused(model, run):
    cache = DynamicCache(config=model.config)
    with moe_lens.record(model, run, tokens=1.0) as rec:
        decode(model, cache, PROMPTS, 0)  # 0
        rec.stop()
        decode(model, cache, PROMPTS[:, :3], 5)  # 1
        cache.crop(-4)  # of 8: the prompts' last tokens are rejected too
        cache.reorder_cache(torch.tensor([1, 0]))
        decode(model, cache, PROMPTS[:, :2], 4)  # 2
        rec.start()
        decode(model, cache, PROMPTS[:, :1], 6)  # 3
    t = Traced(run)
    last = t.tokens[t.tokens.step == 3].sort_values("token")
    assert last.position.tolist() == [6, 6]
    assert last.sequence.tolist() == [1, 0]
    assert t.rejected == {(0, 0, 0, 4), (0, 0, 1, 4)}


def test_a_decoder_does_not_go_on_with_what_another_encoder_read(run):
    model = switch(capacity=64)
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with moe_lens.record(model, run, tokens=1.0) as rec, torch.no_grad():
        model.generate(PROMPTS, **given)
        before = set(flushed(rec, run).tokens.sequence)
        rec.stop()
        on = LogitsProcessorList([Switching(rec, {2: True})])
        model.generate(PROMPTS, logits_processor=on, **given)
    t = Traced(run)
    later = t.tokens[t.tokens.step > 5]
    assert set(later.stream) == {"decoder"}
    assert set(later.sequence).isdisjoint(before)
    assert sorted(set(later.position)) == [2, 3]


def flushed(rec, run):
    rec.flush()
    return Traced(run)


class OnDevice:
    """A cache whose length only a device knows."""

    def get_seq_length(self):
        return torch.empty((), device="meta")


def test_what_only_a_device_knows_is_forgotten(model, run):
    cache = OnDevice()
    with moe_lens.record(model, run, tokens=1.0) as rec:
        following = rec._intake._following
        following._rows[cache] = object()
        following.skip({"past_key_values": cache})
        assert cache not in following._rows
        with torch.no_grad():
            model(PROMPTS)
