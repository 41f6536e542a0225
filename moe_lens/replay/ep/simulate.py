"""One device takes the part of each rank in turn: the slowest of them, and a modelled all-to-all.

Parts that take equally long, because the same choices reach the same slots, are timed once. Every
rank's weights are the same random ones: what they cost does not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from torch import Tensor

from moe_lens.replay.ep.all_to_all import Link
from moe_lens.replay.ep.counted import Row, Spread, Width, counted, spread
from moe_lens.replay.ep.groups import Batch
from moe_lens.replay.ep.workload import Workload
from moe_lens.replay.measure import call, in_graphs
from moe_lens.replay.placement.plan import Placement
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.timing import interleaved, noise_floor

_AGAIN = ("again",)


def simulated(
    batch: Batch,
    plans: list[Placement],
    layers: Mapping[int, MoELayer],
    tokens: Callable[[int], Tensor],
    width: Width,
    link: Link,
    *,
    dedup: bool,
    repeats: int,
) -> list[Row]:
    """Measure one layer in one forward under each placement, their ranks in turn.

    Args:
        batch: What experts compute.
        plans: The placements; the first is the one that is asked about.
        layers: For each number of slots a rank has, a layer of as many experts.
        tokens: Gives so many tokens.
        width: Of rows that are sent.
        link: The modelled all-to-all.
        dedup: Dispatch sends a token once to a rank.
        repeats: How often each part is measured; the median counts.
    """
    over = [spread(batch, plan, dedup=dedup) for plan in plans]
    works: dict[tuple[Any, ...], Callable[[], object]] = {}
    graphs = True
    x_ND = tokens(max(len(part.token_N) for found in over for part in found.parts))
    for plan, found in zip(plans, over, strict=True):
        layer = layers[plan.slots_per_rank]
        for part in found.parts:
            if part.rows and (plan.slots_per_rank, *part.key) not in works:
                works[plan.slots_per_rank, *part.key] = _work(layer, x_ND, part)
                graphs = graphs and in_graphs(layer, part.slots_NJ.size)
    busiest = max(over[0].parts, key=lambda part: part.rows)
    noise = 0.0
    taken: dict[tuple[Any, ...], float] = {}
    if works:
        busiest_key = (plans[0].slots_per_rank, *busiest.key)
        if busiest.rows:
            works[_AGAIN] = works[busiest_key]
        # Names are what the timing knows works by.
        names = {str(i): key for i, key in enumerate(works)}
        device = layers[plans[0].slots_per_rank].device
        seconds = interleaved(
            {name: works[key] for name, key in names.items()}, repeats, device, graphs=graphs
        )
        rounds = {key: seconds[name] for name, key in names.items()}
        taken = {key: 1e9 * median(of) for key, of in rounds.items()}
        if busiest.rows:
            noise = noise_floor(rounds[busiest_key], rounds[_AGAIN])
    return [
        row
        for plan, found in zip(plans, over, strict=True)
        for row in _rows(batch, plan, found, taken, width, link, noise)
    ]


def _work(layer: MoELayer, x_ND: Tensor, part: Workload) -> Callable[[], object]:
    return call(layer, x_ND[: len(part.token_N)], part.slots_NJ, part.weights_NJ)


def _rows(
    batch: Batch,
    plan: Placement,
    found: Spread,
    taken: Mapping[tuple[Any, ...], float],
    width: Width,
    link: Link,
    noise: float,
) -> list[Row]:
    busy_R = [taken[plan.slots_per_rank, *p.key] if p.rows else 0.0 for p in found.parts]
    slowest = max(busy_R)
    there = link.seconds(found.rows_RR * width.dispatch, found.rows_NN * width.dispatch)
    back = link.seconds(found.rows_RR.T * width.combine, found.rows_NN.T * width.combine)
    times = {"mode": "simulated", "dispatch_ns": 1e9 * there, "combine_ns": 1e9 * back}
    return [
        {
            **row,
            **times,
            "busy_ns": busy,
            "wait_ns": slowest - busy,
            "noise_ns": noise * slowest,
        }
        for row, busy in zip(counted(batch, found, plan, width), busy_R, strict=True)
    ]
