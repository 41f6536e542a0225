"""Folders of the granularity laboratory, made up: no student is trained."""

from __future__ import annotations

import math
import random
from pathlib import Path

from moe_lens.commands.lab_results import Results
from moe_lens.granularity.presets import Plan, plan
from moe_lens.granularity.runs import Row, Run


def row_of(run: Run, draw: random.Random) -> Row:
    """What a training might have ended in; one in ten diverged."""
    error = math.inf if draw.random() < 0.1 else draw.uniform(0.01, 0.5)
    student, teacher = run.student, run.teacher
    return Row(
        hidden=run.hidden, kind=run.kind, teacher=teacher.name, teacher_experts=teacher.experts,
        teacher_top_k=teacher.top_k, teacher_width=teacher.width, student=student.name,
        experts=student.experts, top_k=student.top_k, width=student.width, gate_bias=run.gate_bias,
        width_factor=run.width_factor, experts_factor=run.experts_factor,
        learning_rate=run.learning_rate, seed=run.seed, steps=10, batch=4, name=run.name,
        nmse=error, nmse_min=error * draw.uniform(0.5, 1), fvu=1.1 * error, affine_nmse=0.4,
        affine_fvu=0.44, zero_fvu=1.1, sets_used=draw.randint(1, 90), sets_tokens=100,
        sets_bits=math.log2(math.comb(student.experts, student.top_k)),
        seconds=draw.uniform(1, 9), device="cpu", gate=[0.5, 1.5], gate_bias_values=[],
    )  # fmt: skip


def made_up(
    folder: Path,
    preset: str = "quick",
    *,
    students: list[tuple[int, int]] | None = None,
    finished: int | None = None,
    seed: int = 0,
) -> tuple[Plan, list[Row]]:
    """Write a folder of a preset, with its students or these; so many finished (None: all).

    Only a finished one has regions, pictures and sets.
    """
    planned, draw = plan(preset, steps=10, students=students), random.Random(seed)
    rows = [row_of(run, draw) for run in planned.runs][:finished]
    results = Results(folder, planned, force=False)
    for row in draw.sample(rows, len(rows)):  # in the order in which they finish
        results.add(row)
    if finished is not None:
        return planned, rows
    results.save("regions", [
        {"where": where, "router": router, "experts": 16, "top_k": k, "draw": draw, "regions": n,
         "possible_bits": math.log2(math.comb(16, k))}
        for where, router, k, counts in (
            ("circle", "random", 8, (18, 26, 24)), ("plane", "teacher 16e8a", 8, (22,)),
        )
        for draw, n in enumerate(counts)
    ])  # fmt: skip
    results.save("pictures", [
        {"picture": name, "x": float(x), "y": float(y), "region": (x + y) % 3, "chosen": f"{x} {y}"}
        for name in ("random 16e8a, no bias", "<b>teacher</b>") for y in range(4) for x in range(4)
    ])  # fmt: skip
    results.save("configurations", [
        {"hidden": d, "experts": 16, "top_k": 8, "tokens": 1000, "used": 24 * d, "coverage": 0.9,
         "at_least": 30.0 * d, "possible": 12_870}
        for d in (2, 4, 8)
    ])  # fmt: skip
    return planned, rows
