"""Training and evaluation, on a small corpus that a small model learns in seconds."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lens.demo.batches import as_tokens, held_out_windows
from moe_lens.demo.corpus import Domain
from moe_lens.demo.evaluate import evaluate, evaluate_baseline, evaluate_baseline_told
from moe_lens.demo.model import MoEConfig, MoELanguageModel
from moe_lens.demo.train import Progress, Recipe, schedule, train

RECIPE = Recipe(steps=25, sequences=4, length=32, warmup=5)


def run(
    config: MoEConfig, corpus: list[Domain], recorder: Any, recipe: Recipe = RECIPE
) -> tuple[MoELanguageModel, list[Progress]]:
    torch.manual_seed(recipe.seed)
    model = MoELanguageModel(config)
    seen: list[Progress] = []
    train(model, corpus, recorder, recipe, seen.append)
    return model, seen


def test_a_short_training_learns(config: MoEConfig, corpus: list[Domain], recorder: Any) -> None:
    model, seen = run(config, corpus, recorder)
    assert recorder.losses[0].mean() > 4
    assert recorder.losses[-1].mean() < 2
    assert all(bits < 3 for bits in evaluate(model, corpus, recorder, length=32).values())
    assert [progress.step for progress in seen] == list(range(1, 26))
    assert seen[-1].done == 1
    assert seen[-1].dropped_share == pytest.approx(0.2)
    assert seen[-1].load_max_over_mean is None


def test_the_recorder_sees_every_step(
    config: MoEConfig, corpus: list[Domain], recorder: Any
) -> None:
    model, _ = run(config, corpus, recorder, Recipe(steps=3, sequences=4, length=32))
    assert [phase for phase, _ in recorder.steps] == ["train"] * 3
    assert all(sorted(tags) == ["digits"] * 2 + ["letters"] * 2 for _, tags in recorder.steps)
    assert all(loss.shape == (4, 32) for loss in recorder.losses)
    recorder.steps.clear()
    evaluate(model, corpus, recorder, length=32, windows=40)
    assert {phase for phase, _ in recorder.steps} == {"eval"}
    assert [set(tags) for _, tags in recorder.steps] == [{"digits"}] * 2 + [{"letters"}] * 2


def test_bits_per_byte_are_those_of_the_losses(
    config: MoEConfig, corpus: list[Domain], recorder: Any
) -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(config)
    bits = evaluate(model, corpus, recorder, length=32, windows=40)
    for domain in corpus:
        total, count = 0.0, 0
        for row in as_tokens(held_out_windows(domain, 40, 32)):
            prob_SV = model(row[None, :-1]).logits_BSV[0].softmax(-1).tolist()
            for position, byte in enumerate(row[1:]):
                total -= math.log2(prob_SV[position][byte])
                count += 1
        assert count == sum(x.numel() for x in recorder.losses) // 2
        assert bits[domain.tag] == pytest.approx(total / count, rel=1e-4)


def test_the_same_seed_gives_the_same_losses(
    config: MoEConfig, corpus: list[Domain], recorder: Any
) -> None:
    for seed in (1, 1, 2):
        run(config, corpus, recorder, Recipe(steps=4, sequences=4, length=32, seed=seed))
    losses = [loss.tolist() for loss in recorder.losses]
    first, again, other = losses[:4], losses[4:8], losses[8:]
    assert first == again
    assert first != other


def test_a_time_limit_ends_the_training(
    config: MoEConfig, corpus: list[Domain], recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that gains a second whenever it is read: once at the start, once after each step.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("moe_lens.demo.train.time", clock)
    recipe = Recipe(steps=1, seconds=4, sequences=4, length=32)
    _, seen = run(config, corpus, recorder, recipe)
    assert [progress.done for progress in seen] == [0.25, 0.5, 0.75, 1.0]
    assert seen[-1].tokens_per_second == 4 * 32


@pytest.mark.parametrize("recipe", [Recipe(steps=0), Recipe(seconds=0.0)])
def test_nothing_to_train_is_an_error(
    config: MoEConfig, corpus: list[Domain], recorder: Any, recipe: Recipe
) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        run(config, corpus, recorder, recipe)


def test_learning_rate_rises_stays_and_falls() -> None:
    assert schedule(0, 0.0, 20) == pytest.approx(1 / 20)
    assert schedule(100, 0.5, 20) == 1
    assert schedule(100, 0.75, 20) == pytest.approx(0.5)


def test_a_baseline_that_is_told_the_domain_is_the_stronger_one(corpus: list[Domain]) -> None:
    blind = evaluate_baseline(corpus, order=1, length=32)
    told = evaluate_baseline_told(corpus, order=1, length=32)
    assert blind.keys() == told.keys() == {"digits", "letters"}
    assert all(told[tag] <= blind[tag] for tag in told)
