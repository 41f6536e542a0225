"""The lists of runs: what the paper and the reduced experiment compare."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lens.errors import LabError
from moe_lens.granularity.presets import NAMES, plan
from moe_lens.granularity.shapes import Shape


def test_quick_compares_four_students_and_scales_one() -> None:
    planned = plan("quick")
    assert (planned.hidden, planned.kind, planned.recipe.steps) == (32, "linear", 4_000)
    assert {run.teacher for run in planned.runs} == {Shape(16, 8, 4)}
    shapes = [run.student for run in planned.runs]
    assert shapes[:4] == [Shape(16, 8, 5), Shape(8, 4, 10), Shape(4, 2, 20), Shape(2, 1, 40)]
    assert all(shape.top_k * shape.width == 40 for shape in shapes[:4])
    assert [s.width for s in shapes[4:8]] == [40, 80, 160, 320]
    assert [s.experts for s in shapes[8:]] == [8, 16, 32, 64]
    assert [run.width_factor for run in planned.runs[4:8]] == [2, 4, 8, 16]
    assert [run.experts_factor for run in planned.runs[8:]] == [2, 4, 8, 16]


def test_the_papers_grid_and_sweep() -> None:
    planned = plan("paper")
    grid, sweep = planned.runs[:128], planned.runs[128:]
    assert len({(r.teacher, r.student, r.learning_rate) for r in grid}) == 8 * 8 * 2
    assert {r.learning_rate for r in grid} == {1e-3, 1e-2}
    assert {r.teacher for r in sweep} == {Shape(16, 8, 32)}
    assert [r.student for r in sweep[:5]] == [Shape(4 * f, 2, 160) for f in (1, 2, 4, 8, 16)]
    assert len(sweep) == 20
    assert all(r.gate_bias and r.learning_rate == 1e-3 for r in sweep)
    assert not any(r.gate_bias for r in grid)
    # 12,800 steps of 2,048 are the 100 epochs of 2^18 tokens.
    assert planned.recipe.steps * planned.recipe.batch == 100 * 2**18
    assert planned.recipe.epochs == 100
    assert (Shape(12, 6, 53), 318) in {(r.student, 6 * r.student.width) for r in grid}


@pytest.mark.parametrize("name", NAMES)
def test_names_tell_runs_apart(name: str) -> None:
    runs = plan(name).runs
    assert len({run.name for run in runs}) == len(runs) == len(set(runs))


def test_constant_experts_have_no_width() -> None:
    assert {run.student.width for run in plan("constant").runs} == {1}
    assert [run.student.experts for run in plan("constant").runs[4:]] == [8, 16, 32, 64]


def test_ones_own_layers() -> None:
    planned = plan("relu", hidden=64, teacher=(8, 4), students=[(8, 4), (2, 2), (8, 4)], steps=7)
    assert planned.kind == "relu"
    assert [run.student for run in planned.runs] == [Shape(8, 4, 20), Shape(2, 2, 40)]
    assert planned.runs[0].teacher == Shape(8, 4, 16)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"preset": "fast"}, "no preset 'fast': quick, relu, constant, paper"),
        ({"seed": -1}, "a seed is 0 or more, got -1"),
        ({"hidden": 0}, "a hidden size is at least 1, got 0"),
        ({"steps": 0}, "at least 1 step"),
        ({"preset": "paper", "steps": 0}, "at least 1 step"),
        ({"teacher": (4, 8)}, "4e8a: a token cannot use 8 of 4"),
        ({"students": [(64, 41)]}, "64e41a: 40 active neurons over 41 experts a token leave a "
                                   "width below 1"),
        ({"hidden": 4}, "16e8a: 5 active neurons over 8 experts .* larger hidden size"),
        ({"preset": "paper", "teacher": (4, 2)}, "has teachers and students of its own"),
        ({"preset": "paper", "hidden": 8}, "width below 1"),
    ],
)  # fmt: skip
def test_what_cannot_be(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(LabError, match=says) as caught:
        plan(**asked)
    assert "\n" not in str(caught.value)
