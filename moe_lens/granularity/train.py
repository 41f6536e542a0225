"""How does a student learn its teacher? AdamW, a cosine, and new inputs at every step.

The recipe of arXiv 2505.06839: inputs are N(0, I) and never come again, the loss is the squared
norm of the difference, the learning rate falls along a half cosine, once an epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_lens.errors import LabError
from moe_lens.granularity.draws import inputs
from moe_lens.granularity.fit import Target
from moe_lens.granularity.layer import MoE


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch: New tokens of a step.
        epochs: Equal parts of the training; after each the student is judged. At most `steps`.
        weight_decay: AdamW's, torch's default.

    Raises:
        LabError: There is nothing to train on.
    """

    steps: int = 4_000
    batch: int = 512
    epochs: int = 40
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.epochs) < 1:
            raise LabError(
                f"training takes at least 1 step, token and epoch; got {self.steps} steps of "
                f"{self.batch} tokens in {self.epochs} epochs."
            )


@dataclass(frozen=True)
class Judged:
    """Mean squared norm of the error on the test sample, and what it took.

    Attributes:
        last: At the end.
        least: After the best epoch; NaN where none was finite.
        seconds: Wall clock.
    """

    last: float
    least: float
    seconds: float


def train(
    student: MoE,
    teacher: MoE,
    target: Target,
    recipe: Recipe,
    *,
    learning_rate: float,
    drawn: torch.Generator,
    on_step: Callable[[], None],
) -> Judged:
    """Train the student in place.

    Args:
        student: Its weights; they are changed.
        teacher: What is to be learned; on the same device.
        target: The test sample.
        recipe: How long and how.
        learning_rate: Of the first epoch.
        drawn: Draws the inputs, on the device of `target` if that is where they are needed.
        on_step: Called after every step.
    """
    device = str(target.x_TD.device)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    epochs = min(recipe.epochs, recipe.steps)
    errors: list[float] = []
    step, start = 0, time.perf_counter()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        while step < recipe.steps * (epoch + 1) // epochs:
            x_TD = inputs(recipe.batch, student.hidden, drawn, device)
            with torch.no_grad():
                y_TD = teacher(x_TD)
            loss = (student(x_TD) - y_TD).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            on_step()
        errors.append(target.error(student))
    # A training that diverged ends in NaN, which min() would pass over or not by its place.
    least = min((e for e in errors if math.isfinite(e)), default=math.nan)
    return Judged(errors[-1], least, time.perf_counter() - start)
