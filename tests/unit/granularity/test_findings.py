"""Which rows stand in which table, and which of several learning rates counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.laboratories import made_up, row_of

from moe_lens import granularity
from moe_lens.granularity import findings, published
from moe_lens.granularity.presets import NAMES, plan


def of_plan(preset: str, **more: object) -> tuple[granularity.Plan, list[granularity.Row]]:
    import random

    draw = random.Random(5)
    planned = plan(preset, **more)  # type: ignore[arg-type]
    return planned, [row_of(run, draw) for run in planned.runs]


@pytest.mark.parametrize("preset", NAMES)
def test_every_student_stands_in_a_table(preset: str) -> None:
    planned, rows = of_plan(preset)
    gap, sweeps = findings.gap(planned, rows), findings.sweeps(planned, rows)
    shown = {(r["student"], r["width"]) for r in [*gap, *sweeps]}
    assert shown == {(row.student, row.width) for row in rows}
    if preset == "paper":
        assert (len(gap), len(sweeps)) == (64, 20)
    else:
        assert [r["top_k"] for r in gap] == [8, 4, 2, 1]
        assert {r["factor"] for r in sweeps} == {1, 2, 4, 8, 16}
        assert {r["swept"] for r in sweeps} == (
            {"experts"} if preset == "constant" else {"width", "experts"}
        )


@pytest.mark.parametrize(
    ("students", "gap", "swept"),
    [
        (["16e2a"], ["16e2a"], []),
        (["4e4a", "16e2a", "8e2a"], ["4e4a", "16e2a", "8e2a"], []),
        (["4e2a", "16e2a"], ["4e2a"], [("4e2a", 1), ("16e2a", 4)]),
        (["8e4a", "4e4a"], ["8e4a"], [("4e4a", 0.5), ("8e4a", 1)]),
    ],
)
def test_students_of_another_number_of_experts(
    students: list[str], gap: list[str], swept: list[tuple[str, float]]
) -> None:
    planned, rows = of_plan("quick", students=[granularity_shape(s) for s in students])
    assert [r["student"] for r in findings.gap(planned, rows)] == gap
    found = findings.sweeps(planned, rows)
    assert [(r["student"], r["factor"]) for r in found] == swept


def granularity_shape(text: str) -> tuple[int, int]:
    experts, top_k = text.removesuffix("a").split("e")
    return int(experts), int(top_k)


def test_the_better_learning_rate_counts_and_what_diverged_comes_last() -> None:
    planned, rows = of_plan("paper")
    at = {(r.teacher, r.student, r.learning_rate): r for r in rows if not r.gate_bias}
    changed = []
    for row in rows:
        nmse = 0.2 if row.learning_rate == 1e-3 else 0.1
        if row.student == "4e2a" and row.learning_rate == 1e-2:
            nmse = math.nan
        changed.append(replace(row, nmse=9.0, nmse_min=nmse))
    for found in findings.gap(planned, changed):
        low = found["student"] == "4e2a"
        assert found["nmse"] == (0.2 if low else 0.1)
        rate = 1e-3 if low else 1e-2
        assert found["seconds"] == at[found["teacher"], found["student"], rate].seconds
        top_k, of = found["top_k"], found["teacher_top_k"]
        assert found["published"] == published.of_grid(top_k, of)


def test_the_other_presets_report_the_end_of_the_training() -> None:
    planned, rows = of_plan("quick")
    ended = [replace(row, nmse=0.3, nmse_min=0.1) for row in rows]
    assert {r["nmse"] for r in findings.gap(planned, ended)} == {0.3}
    assert {r["published"] for r in findings.gap(planned, ended)} == {None}


def test_the_front_has_what_it_says(tmp_path: Path) -> None:
    for name in granularity.__all__:
        assert getattr(granularity, name).__name__ == name
    assert set(granularity.__all__) <= set(dir(granularity))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        granularity.nothing  # noqa: B018
    planned, rows = made_up(tmp_path)
    assert granularity.gap(planned, rows) == findings.gap(planned, rows)
