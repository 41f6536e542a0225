"""How does the demo learn? AdamW, a linear schedule, and a recorder that sees every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.demo.batches import training_batch

if TYPE_CHECKING:
    from moe_lens.demo.corpus import Domain
    from moe_lens.demo.model import MoELanguageModel
    from moe_lens.demo.recorder import Recorder

_SCALARS_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Optimizer steps. The default takes about two minutes on two idle cores; a slower
            machine takes longer for the same model.
        seconds: Stop after this time instead, whatever the number of steps.
        sequences: B, sequences of a step.
        length: S, tokens of a sequence.
        learning_rate: Peak, after ``warmup`` steps; it falls to zero over the second half.
        aux_weight: Weight of the load-balancing loss.
        z_weight: Weight of the router z-loss.
        seed: What the training windows are drawn from.
    """

    steps: int = 480
    seconds: float | None = None
    sequences: int = 16
    length: int = 128
    learning_rate: float = 4e-3
    warmup: int = 20
    weight_decay: float = 0.0
    aux_weight: float = 0.01
    z_weight: float = 0.001
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands after a step.

    Attributes:
        step: Steps done.
        done: Share of the training that is done, 0 to 1.
        bits_per_byte: Loss of the step's batch, smoothed over about ten steps.
        tokens_per_second: Since the start.
        load_max_over_mean: Hottest expert over the mean expert, mean over layers, seen a few steps
            ago; None until the recorder said it.
        dropped_share: Dropped choices over all choices, likewise.
    """

    step: int
    done: float
    bits_per_byte: float
    tokens_per_second: float
    load_max_over_mean: float | None
    dropped_share: float | None


def train(
    model: MoELanguageModel,
    corpus: Sequence[Domain],
    recorder: Recorder,
    recipe: Recipe,
    on_step: Callable[[Progress], None],
) -> Progress:
    """Train the model in place and return where it ended.

    Args:
        model: Its weights; they are changed.
        corpus: The domains; each step has its equal share of each.
        recorder: Sees each step with the domains as tags, phase "train", and the losses.
        recipe: How long and how.
        on_step: Called after every step.

    Raises:
        ValueError: The recipe asks for no step.
    """
    if recipe.steps < 1 or (recipe.seconds is not None and recipe.seconds <= 0):
        raise ValueError(f"nothing to train: steps {recipe.steps}, seconds {recipe.seconds}")
    rng = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    model.train()
    step, done, smooth = 0, 0.0, math.nan
    scalars: Mapping[str, float] = {}
    start = time.perf_counter()
    while True:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, done, recipe.warmup)
        bytes_BS1, tags = training_batch(corpus, recipe.sequences, recipe.length, rng)
        with recorder.step(tags=tags, phase="train"):
            output = model(bytes_BS1[:, :-1], bytes_BS1[:, 1:])
            recorder.loss(output.loss_BS)
            loss = output.loss_BS.mean()
            router_loss = recipe.aux_weight * output.aux_loss + recipe.z_weight * output.z_loss
            (loss + router_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        bits = loss.item() / math.log(2)
        smooth = bits if step == 0 else 0.9 * smooth + 0.1 * bits
        if step % _SCALARS_EVERY == 0:
            scalars = recorder.scalars()
        step += 1
        elapsed = time.perf_counter() - start
        done = step / recipe.steps if recipe.seconds is None else elapsed / recipe.seconds
        progress = Progress(
            step=step,
            done=min(done, 1.0),
            bits_per_byte=smooth,
            tokens_per_second=step * recipe.sequences * recipe.length / elapsed,
            load_max_over_mean=mean_over_layers(scalars, "load_max_over_mean"),
            dropped_share=mean_over_layers(scalars, "dropped_share"),
        )
        on_step(progress)
        if done >= 1:
            return progress


def schedule(step: int, done: float, warmup: int) -> float:
    """Learning rate over its peak: up over ``warmup`` steps, down over the second half."""
    return min(1.0, (step + 1) / warmup, 2 * (1 - done))


def mean_over_layers(scalars: Mapping[str, float], name: str) -> float | None:
    """Mean of ``moe/layer*/NAME``; None where no layer has it."""
    values = [value for key, value in scalars.items() if key.endswith(f"/{name}")]
    return sum(values) / len(values) if values else None
