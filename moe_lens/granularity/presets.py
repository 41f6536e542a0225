"""Which students learn which teachers? Lists of runs, and the recipe of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lens.errors import LabError
from moe_lens.granularity import published
from moe_lens.granularity.runs import Run
from moe_lens.granularity.shapes import (
    Kind,
    Shape,
    active_of_student,
    active_of_teacher,
    check_kind,
    matched,
)
from moe_lens.granularity.train import Recipe

NAMES = ("quick", "relu", "constant", "paper")

_FACTORS = (2, 4, 8, 16)
_SWEPT = 2
"""The student whose width and number of experts grow: one that uses two experts a token."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        preset: Its name.
        hidden: d.
        kind: What experts compute.
        seed: Of all that is drawn.
        recipe: Of all trainings.
        runs: Different from each other; the one that others are compared with comes first.
    """

    preset: str
    hidden: int
    kind: Kind
    seed: int
    recipe: Recipe
    runs: tuple[Run, ...]


def plan(
    preset: str = "quick",
    *,
    seed: int = 0,
    steps: int | None = None,
    hidden: int | None = None,
    teacher: tuple[int, int] | None = None,
    students: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """The runs of a preset.

    Args:
        preset: One of `NAMES`. `quick`: linear experts, hidden size 32. `relu`, `constant`: the
            same with these. `paper`: the 8 x 8 grid and the sweep of the paper, hidden size 256.
        seed: Of all that is drawn, 0 or more.
        steps: Optimizer steps of each run, in place of the preset's.
        hidden: In place of the preset's.
        teacher: (experts, experts a token), in place of 16e8a; not with `paper`.
        students: Likewise, in place of 16e8a, 8e4a, 4e2a and 2e1a, and then only these: without
            the sweeps of width and of experts.

    Raises:
        LabError: There is no such preset, or a layer of it cannot be.
    """
    if preset not in NAMES:
        raise LabError(f"there is no preset {preset!r}: {', '.join(NAMES)}.")
    if seed < 0:
        raise LabError(f"a seed is 0 or more, got {seed}.")
    if hidden is not None and hidden < 1:
        raise LabError(f"a hidden size is at least 1, got {hidden}.")
    if preset == "paper":
        if teacher is not None or students is not None:
            raise LabError(
                "the preset 'paper' has teachers and students of its own; "
                "choose yours with another preset."
            )
        recipe = Recipe(steps=12_800 if steps is None else steps, batch=2_048, epochs=100)
        runs = _paper(hidden or 256, seed)
        return Plan(preset, hidden or 256, "relu", seed, recipe, runs)
    kind: Kind = "linear" if preset == "quick" else check_kind(preset)
    of, recipe = teacher or (16, 8), Recipe(steps=4_000 if steps is None else steps)
    runs = _small(hidden or 32, kind, seed, of, students)
    return Plan(preset, hidden or 32, kind, seed, recipe, runs)


def _small(
    hidden: int,
    kind: Kind,
    seed: int,
    teacher: tuple[int, int],
    students: Sequence[tuple[int, int]] | None,
) -> tuple[Run, ...]:
    constant = kind == "constant"

    def run(shape: Shape) -> Run:
        of = Shape(*teacher, 1) if constant else matched(*teacher, active_of_teacher(hidden))
        return Run(hidden=hidden, kind=kind, teacher=of, student=shape, seed=seed)

    def student(experts: int, top_k: int, wider: int = 1) -> Run:
        if constant:  # they have no width
            return run(Shape(experts, top_k, 1))
        shape = matched(experts, top_k, active_of_student(hidden))
        return run(Shape(experts, top_k, shape.width * wider))

    if students is not None:
        made = [student(*each) for each in students]
    else:
        made = [student(2 * k, k) for k in (8, 4, 2, 1)]
        if not constant:
            made += [student(2 * _SWEPT, _SWEPT, factor) for factor in _FACTORS]
        made += [student(2 * _SWEPT * factor, _SWEPT) for factor in _FACTORS]
    return tuple(dict.fromkeys(made))


def _paper(hidden: int, seed: int) -> tuple[Run, ...]:
    """The grid at two learning rates, then the sweep at the lower: the higher diverges there."""
    ks = published.TOP_KS
    grid = [
        Run(
            hidden=hidden,
            kind="relu",
            teacher=matched(2 * of, of, active_of_teacher(hidden)),
            student=matched(2 * k, k, active_of_student(hidden)),
            learning_rate=rate,
            seed=seed,
        )
        for rate in (1e-3, 1e-2)
        for k in ks
        for of in ks
    ]
    sweep = [
        Run(
            hidden=hidden,
            kind="relu",
            teacher=matched(16, 8, active_of_teacher(hidden)),
            student=matched(2 * k * factor, k, active_of_student(hidden)),
            gate_bias=True,
            learning_rate=1e-3,
            seed=seed,
        )
        for k in published.SWEEP_TOP_KS
        for factor in published.SWEEP_FACTORS
    ]
    return (*grid, *sweep)
