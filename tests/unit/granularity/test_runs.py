"""Runs and rows: chance is of the setting alone, processes change nothing, errors are one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch

from moe_lens.errors import LabError
from moe_lens.granularity import side_by_side
from moe_lens.granularity.draws import generator, inputs
from moe_lens.granularity.fit import Target
from moe_lens.granularity.presets import Plan
from moe_lens.granularity.runs import Row, Run, routed_inputs, teacher_of
from moe_lens.granularity.shapes import Shape
from moe_lens.granularity.side_by_side import executed
from moe_lens.granularity.train import Recipe


def without_time(row: Row) -> dict[str, object]:
    return asdict(row) | {"seconds": None}


def test_a_row_says_what_ran_and_what_it_came_to(planned: Plan, rows: list[Row]) -> None:
    same, one = rows
    assert (same.name, one.name) == ("4e2a > 4e2a w5 lr 0.01", "4e2a > 2e1a w10 lr 0.01")
    assert (same.teacher, same.teacher_width, same.student) == ("4e2a", 4, "4e2a")
    assert (same.steps, same.batch, same.seed, same.device) == (6, 512, 3, "cpu")
    # The yardsticks once more, from a sample that has no part in them.
    teacher = teacher_of(planned.runs[0])
    x_TD = inputs(60_000, 8, torch.Generator().manual_seed(99), "cpu")
    other = Target.of(x_TD, teacher(x_TD))
    assert same.zero_fvu == pytest.approx(other.power / other.variance, rel=0.02)
    for row in rows:
        assert row.nmse * row.zero_fvu == pytest.approx(row.fvu)
        assert row.affine_nmse * row.zero_fvu == pytest.approx(row.affine_fvu)
        assert 0 < row.affine_nmse < 1
        assert row.nmse_min <= row.nmse
        assert len(row.gate) == row.experts * 8


def test_the_row_keeps_the_router(rows: list[Row]) -> None:
    row = rows[0]
    logits_TE = routed_inputs(8, 3) @ torch.tensor(row.gate).view(4, 8).T
    sets = {frozenset(ids) for ids in logits_TE.topk(2, dim=1).indices.tolist()}
    assert row.sets_used == len(sets)
    assert 2**row.sets_bits == pytest.approx(6)


def test_chance_depends_on_the_setting_alone(planned: Plan, rows: list[Row]) -> None:
    (alone,) = executed(planned.runs[1:], planned.recipe)
    assert without_time(alone) == without_time(rows[1])
    (other,) = executed([replace(planned.runs[1], seed=4)], planned.recipe)
    assert other.nmse != alone.nmse
    assert other.affine_nmse != alone.affine_nmse


def test_teacher_and_student_of_one_shape_are_two_layers() -> None:
    run = Run(hidden=8, kind="linear", teacher=Shape(4, 2, 4), student=Shape(4, 2, 4))
    (row,) = executed([run], Recipe(steps=1, batch=1))
    assert row.nmse > 0.1


def test_generators_of_different_uses_differ() -> None:
    uses = [generator(0, use).initial_seed() for use in ("teacher", "student", "train", "test")]
    assert len({*uses, generator(1, "train").initial_seed()}) == 5
    assert generator(0, "train").initial_seed() == uses[2]


def test_processes_find_the_same(planned: Plan, rows: list[Row]) -> None:
    said: list[tuple[str, int]] = []
    found = list(
        executed(
            planned.runs,
            planned.recipe,
            workers=2,
            on_progress=lambda run, done: said.append((run.name, done)),
        )
    )
    by_name = {row.name: without_time(row) for row in found}
    assert by_name == {row.name: without_time(row) for row in rows}


def test_progress_is_told_now_and_then(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_SAY_EVERY", 0.0)
    said: list[tuple[str, int]] = []
    list(executed(planned.runs[:1], planned.recipe,
                  on_progress=lambda run, done: said.append((run.name, done))))  # fmt: skip
    assert said == [(planned.runs[0].name, n) for n in range(1, 7)]


def test_a_process_that_dies_is_one_line(planned: Plan) -> None:
    long = replace(planned.recipe, steps=10_000_000)

    def kill(run: Run, done: int) -> None:
        import multiprocessing

        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(LabError, match=r"died \(exit code -9\). What finished is kept") as caught:
        list(executed(planned.runs, long, workers=2, on_progress=kill))
    assert "\n" not in str(caught.value)


def test_leaving_early_ends_the_processes(planned: Plan) -> None:
    import multiprocessing

    class Left(Exception):
        pass

    def leave(run: Run, done: int) -> None:
        raise Left

    long = replace(planned.recipe, steps=10_000_000)
    with pytest.raises(Left):
        list(executed(planned.runs, long, workers=2, on_progress=leave))
    assert multiprocessing.active_children() == []


def test_no_memory_is_one_line(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Callable[[], Row]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    monkeypatch.setattr(side_by_side, "execute", full)
    with pytest.raises(LabError, match=r"no memory left.*fewer --workers") as caught:
        list(executed(planned.runs, planned.recipe))
    assert "\n" not in str(caught.value)


def test_no_workers(planned: Plan) -> None:
    with pytest.raises(LabError, match="at least 1 process, got 0"):
        list(executed(planned.runs, planned.recipe, workers=0))
