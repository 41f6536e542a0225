"""What do routers make of the plane, and of higher dimensions? Tables of experiments 3 and 4.

Nothing here is trained, except the routers that earlier runs ended in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from moe_lens.granularity.configurations import of_random_router
from moe_lens.granularity.draws import numpy_generator
from moe_lens.granularity.partition import Floats, in_square, on_circle, raster, through
from moe_lens.granularity.presets import Plan
from moe_lens.granularity.runs import Row, teacher_of
from moe_lens.metrics.subsets import reachable

CIRCLE = ((4, 2), (8, 4), (16, 8), (32, 16), (64, 8), (16, 1), (16, 2))
SQUARE = ((4, 2), (8, 4), (16, 8), (16, 1), (16, 2))
"""Experts and experts a token of the routers that are drawn."""
ROUTERS = 5
"""So many of each are drawn."""
SIDE = 160
"""Points along a picture's side."""
DIMENSIONS = (2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = 200_000

Record = dict[str, Any]


def region_counts(plan: Plan, rows: Iterable[Row]) -> list[Record]:
    """How many regions there are: on the circle, in the square, on a plane through trained ones.

    Returns:
        `where`, `router`, `experts`, `top_k`, `draw` (of the random ones), `regions`, and
        `possible_bits`, log2 C(m, k).
    """
    found = []
    for where, sizes in (("circle", CIRCLE), ("square", SQUARE)):
        for experts, top_k in sizes:
            for draw in range(ROUTERS):
                gate_M2, bias_M = _random(plan.seed, experts, top_k, draw)
                if where == "circle":
                    regions = len(on_circle(gate_M2, top_k))
                else:
                    regions = len(in_square(gate_M2, bias_M, top_k))
                found.append(_counted(where, "random", experts, top_k, draw, regions))
    for name, top_k, gate_M2, bias_M in _trained(plan, rows):
        regions = len(in_square(gate_M2, bias_M, top_k))
        found.append(_counted("plane", name, len(bias_M), top_k, 0, regions))
    return found


def pictures(plan: Plan, rows: Iterable[Row]) -> list[Record]:
    """The square, point by point: of random routers without a bias and with one, and trained ones.

    Returns:
        `picture`, `x`, `y`, `region` (numbered from 0 as met from below), `chosen` (its experts).
    """
    gate_M2, bias_M = _random(plan.seed, 16, 8, 0)
    shown = [
        ("random 16e8a, no bias", 8, gate_M2, 0 * bias_M),
        ("random 16e8a", 8, gate_M2, bias_M),
        *_trained(plan, rows),
    ]
    return [
        point for name, top_k, gate, bias in shown for point in _points(name, top_k, gate, bias)
    ]


def realised_sets(seed: int, tokens: int = TOKENS) -> list[Record]:
    """Sets that random 16e8a routers choose, as inputs have more dimensions.

    Returns:
        `hidden`, `experts`, `top_k`, `tokens`, `used`, `coverage`, `at_least`, `possible`.
    """
    found = []
    for hidden in DIMENSIONS:
        of = of_random_router(16, 8, hidden, tokens=tokens, seed=seed)
        found.append(
            {
                "hidden": hidden,
                "experts": 16,
                "top_k": 8,
                "tokens": of.tokens,
                "used": of.used,
                "coverage": of.coverage,
                "at_least": of.at_least,
                "possible": reachable(16, 8),
            }
        )
    return found


def _random(seed: int, experts: int, top_k: int, draw: int) -> tuple[Floats, Floats]:
    rng = numpy_generator(seed, "regions", experts, top_k, draw)
    return rng.normal(size=(experts, 2)), rng.normal(size=experts)


def _counted(where: str, router: str, experts: int, top_k: int, draw: int, regions: int) -> Record:
    return {
        "where": where,
        "router": router,
        "experts": experts,
        "top_k": top_k,
        "draw": draw,
        "regions": regions,
        "possible_bits": math.log2(reachable(experts, top_k)),
    }


def _trained(plan: Plan, rows: Iterable[Row]) -> Iterator[tuple[str, int, Floats, Floats]]:
    """The first run's teacher, and its students of equal width and number, all on one plane."""
    first = plan.runs[0]

    def seen(gate_MD: Floats, bias_M: Floats) -> tuple[Floats, Floats]:
        return through(gate_MD, bias_M, numpy_generator(plan.seed, "regions"))

    teacher = first.teacher
    gate_MD = teacher_of(first).gate_ED.double().numpy()
    yield f"teacher {teacher.name}", teacher.top_k, *seen(gate_MD, np.zeros(teacher.experts))
    by_name = {row.name: row for row in rows}
    for run in plan.runs:
        row = by_name[run.name]
        plain = row.width_factor == row.experts_factor == 1 and not row.gate_bias
        if not plain or run.teacher != teacher or run.learning_rate != first.learning_rate:
            continue
        gate_MD = np.array(row.gate).reshape(row.experts, row.hidden)
        yield f"student {row.student}", row.top_k, *seen(gate_MD, np.zeros(row.experts))


def _points(name: str, top_k: int, gate_M2: Floats, bias_M: Floats) -> Iterator[Record]:
    at, sets = raster(gate_M2, bias_M, top_k, SIDE)
    number = {chosen: n for n, chosen in enumerate(dict.fromkeys(sets))}
    for place, chosen in enumerate(sets):
        yield {
            "picture": name,
            "x": float(at[place % SIDE]),
            "y": float(at[place // SIDE]),
            "region": number[chosen],
            "chosen": " ".join(map(str, sorted(chosen))),
        }
