"""Training: its schedule, what it leaves alone, and the gap between students."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_lens.errors import LabError
from moe_lens.granularity.fit import Target
from moe_lens.granularity.layer import MoE
from moe_lens.granularity.presets import plan
from moe_lens.granularity.shapes import Shape
from moe_lens.granularity.side_by_side import executed
from moe_lens.granularity.train import Recipe, train


def layer(seed: int) -> MoE:
    return MoE(Shape(4, 2, 3), 6, "linear", torch.Generator().manual_seed(seed))


def trained(recipe: Recipe, rate: float = 1e-2) -> tuple[MoE, MoE, Target, list[int], float]:
    teacher, student = layer(0).requires_grad_(False), layer(1)
    x_TD = torch.randn(500, 6, generator=torch.Generator().manual_seed(2))
    target, steps = Target.of(x_TD, teacher(x_TD)), [0]
    judged = train(
        student,
        teacher,
        target,
        recipe,
        learning_rate=rate,
        drawn=torch.Generator().manual_seed(3),
        on_step=lambda: steps.append(steps[-1] + 1),
    )
    assert judged.last == target.error(student)
    assert judged.least <= judged.last
    return student, teacher, target, steps, judged.last


def test_every_step_is_told_and_the_teacher_stays() -> None:
    _, teacher, _, steps, _ = trained(Recipe(steps=37, batch=8, epochs=10))
    assert steps == list(range(38))
    assert torch.equal(teacher.in_DH, layer(0).in_DH)


def test_it_learns() -> None:
    *_, target, _, error = trained(Recipe(steps=300, batch=128))
    assert error < 0.2 * target.error(layer(1))


def test_the_rate_falls_along_a_half_cosine_epoch_by_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    trained(Recipe(steps=12, batch=4, epochs=4), rate=0.5)
    model = torch.nn.Linear(1, 1)
    theirs = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=4)
    expected = []
    for _ in range(4):
        expected += [theirs.param_groups[0]["lr"]] * 3
        theirs.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_fewer_steps_than_epochs() -> None:
    assert trained(Recipe(steps=3, batch=4, epochs=100))[3] == [0, 1, 2, 3]


def test_a_training_that_diverges_says_so() -> None:
    teacher = layer(0).requires_grad_(False)
    x_TD = torch.randn(50, 6)
    judged = train(
        layer(1),
        teacher,
        Target.of(x_TD, teacher(x_TD)),
        Recipe(steps=4, batch=4),
        learning_rate=1e30,
        drawn=torch.Generator(),
        on_step=lambda: None,
    )
    assert not math.isfinite(judged.last)


@pytest.mark.parametrize("what", ["steps", "batch", "epochs"])
def test_nothing_to_train_on(what: str) -> None:
    with pytest.raises(LabError, match="at least 1 step, token and epoch; got"):
        replace(Recipe(), **{what: 0})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fewer_experts_a_token_cannot_be_made_up_for() -> None:
    """The paper's claim: the preset quick, seed 0, its students of equal active parameters.

    Both seeds, the scaled students and ReLU are in benchmarks/granularity.py.
    """
    planned = plan("quick", students=[(2, 1), (4, 2), (8, 4), (16, 8)])
    assert planned.recipe == plan("quick").recipe
    one, two, four, eight = executed(planned.runs, planned.recipe)
    assert one.nmse > 0.28
    assert two.nmse > 0.18
    assert four.nmse > 0.10
    assert eight.nmse < 0.02
    assert one.nmse > two.nmse > four.nmse > eight.nmse
    (affine,) = {row.affine_nmse for row in (one, two, four, eight)}
    assert 0.35 < affine < 0.37
