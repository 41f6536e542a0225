"""What do the rows say? Tables of experiments 1 and 2, with the author's numbers beside ours.

Loads no torch: the dashboard reads the rows of a folder through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from moe_lens.granularity import published

if TYPE_CHECKING:
    from moe_lens.granularity.runs import Row

Record = dict[str, Any]


class Planned(Protocol):
    """A plan, or what a folder says of one."""

    @property
    def preset(self) -> str: ...


def gap(plan: Planned, rows: Iterable[Row]) -> list[Record]:
    """Experiment 1: students of equal active parameters, by teacher, the largest k first.

    Those with more or fewer than 2k experts stand in `sweeps`, where one with 2k is beside them. Of
    several learning rates the better one counts, as the paper has it. The author's numbers stand
    beside the preset `paper` alone: other sizes are other experiments.
    """
    equal = [row for row in rows if row.width_factor == 1 and not row.gate_bias]
    plain = {row.top_k for row in equal if row.experts_factor == 1}
    equal = [row for row in equal if row.experts_factor == 1 or row.top_k not in plain]
    found = []
    for row in _best(plan, equal):
        is_published = plan.preset == "paper" and row.teacher_experts == 2 * row.teacher_top_k
        author = published.of_grid(row.top_k, row.teacher_top_k) if is_published else None
        found.append(_said(plan, row) | {"published": author})
    return sorted(found, key=lambda r: (r["teacher_top_k"], -r["top_k"]))


def sweeps(plan: Planned, rows: Iterable[Row]) -> list[Record]:
    """Experiment 2: students of the same k, wider or with more experts; factor 1 is in both.

    Returns:
        Nothing where no student was scaled.
    """
    rows = [row for row in rows if plan.preset != "paper" or row.gate_bias]
    found = []
    for swept, factor, other in (
        ("width", "width_factor", "experts_factor"),
        ("experts", "experts_factor", "width_factor"),
    ):
        of = [row for row in rows if getattr(row, other) == 1]
        plain = {row.top_k for row in of if getattr(row, factor) == 1}
        scaled = {row.top_k for row in of if getattr(row, factor) != 1} & plain
        for row in _best(plan, [row for row in of if row.top_k in scaled]):
            times = getattr(row, factor)
            author = published.of_sweep(row.top_k, times) if plan.preset == "paper" else None
            found.append(_said(plan, row) | {"swept": swept, "factor": times, "published": author})
    return sorted(found, key=lambda r: (r["swept"] != "width", r["top_k"], r["factor"]))


def _best(plan: Planned, rows: Iterable[Row]) -> list[Row]:
    """The row of the learning rate with the least error, of each teacher and student."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row.teacher, row.student, row.width, row.gate_bias)
        if key not in best or _error(plan, row) < _error(plan, best[key]):
            best[key] = row
    return list(best.values())


def _error(plan: Planned, row: Row) -> float:
    """The paper reports the least error after an epoch; a training that diverged comes last."""
    error = row.nmse_min if plan.preset == "paper" else row.nmse
    return error if math.isfinite(error) else math.inf


def _said(plan: Planned, row: Row) -> Record:
    return {
        "teacher": row.teacher,
        "teacher_top_k": row.teacher_top_k,
        "student": row.student,
        "experts": row.experts,
        "top_k": row.top_k,
        "width": row.width,
        "nmse": _error(plan, row),
        "fvu": row.fvu,
        "affine_nmse": row.affine_nmse,
        "affine_fvu": row.affine_fvu,
        "zero_fvu": row.zero_fvu,
        "sets_used": row.sets_used,
        "sets_tokens": row.sets_tokens,
        "possible": 2.0**row.sets_bits,
        "learning_rate": row.learning_rate,
        "seconds": row.seconds,
    }
