"""Each rank in a process of its own: it dispatches, computes and combines, and is timed at that.

Every rank reads the trace and takes its own tokens from it. On a CPU an exchange is gloo over the
loopback of one machine: what counts there is who sends what to whom, not how long it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_lens.replay.ep.counted import Row, Spread, Width, counted, spread
from moe_lens.replay.ep.exchange import Arrived, Route, combine, dispatch, route
from moe_lens.replay.ep.groups import Batch
from moe_lens.replay.ep.world import World
from moe_lens.replay.measure import rows_by_expert
from moe_lens.replay.placement.plan import Placement
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.timing import noise_floor

_T = TypeVar("_T")


@dataclass
class _Turn:
    """One placement at work on one batch, in this process."""

    layer: MoELayer
    over: Spread
    to: Route
    x_TD: Tensor
    rows_E: list[int]


def exchanged(
    batch: Batch,
    plans: list[Placement],
    layers: Mapping[int, MoELayer],
    tokens: Callable[[int], Tensor],
    width: Width,
    world: World,
    *,
    dedup: bool,
    repeats: int,
) -> list[Row]:
    """Measure one layer in one forward under each placement, side by side with the other ranks.

    Args:
        batch: What experts compute, of all ranks.
        plans: The placements; the first is the one that is asked about.
        layers: For each number of slots a rank has, this rank's experts.
        tokens: Gives so many tokens.
        width: Of rows that are sent.
        world: The processes.
        dedup: Dispatch sends a token once to a rank.
        repeats: How often; the median counts.

    Returns:
        Rows of all ranks, the same on every rank.
    """
    turns = [_turn(batch, plan, layers, tokens, world, dedup=dedup) for plan in plans]
    taken: list[list[tuple[float, float, float]]] = [[] for _ in range(len(plans) + 1)]
    for i in range(repeats + 1):
        for found, turn in zip(taken, [*turns, turns[0]], strict=True):
            times = _once(turn, world)
            if i:  # the first warms up
                found.append(times)
    medians = [[1e9 * median(column) for column in zip(*of, strict=True)] for of in taken[:-1]]
    busy, again = ([times[1] for times in taken[at]] for at in (0, -1))
    own = [number for times in medians for number in times]
    every = world.gathered([*own, noise_floor(busy, again) if min(busy + again) > 0 else 0.0])
    rows = []
    for i, (plan, turn) in enumerate(zip(plans, turns, strict=True)):
        of_rank = [numbers[3 * i : 3 * i + 3] for numbers in every]
        slowest = max(range(world.size), key=lambda rank: of_rank[rank][1])
        most = of_rank[slowest][1]
        for row, (there, busy_ns, back) in zip(
            counted(batch, turn.over, plan, width), of_rank, strict=True
        ):
            rows.append(
                {
                    **row,
                    "mode": "real",
                    "busy_ns": busy_ns,
                    "wait_ns": most - busy_ns,
                    "noise_ns": every[slowest][-1] * most,
                    "dispatch_ns": there,
                    "combine_ns": back,
                }
            )
    return rows


def _turn(
    batch: Batch,
    plan: Placement,
    layers: Mapping[int, MoELayer],
    tokens: Callable[[int], Tensor],
    world: World,
    *,
    dedup: bool,
) -> _Turn:
    over = spread(batch, plan, dedup=dedup)
    mine_T = np.flatnonzero(over.source_T == world.rank)
    to = route(
        over.slot_TK[mine_T],
        batch.weights_TK[mine_T],
        plan.ranks,
        plan.slots_per_rank,
        dedup=dedup,
        device=world.device,
    )
    layer = layers[plan.slots_per_rank]
    rows_E = rows_by_expert(over.parts[world.rank].slots_NJ, layer.experts).tolist()
    return _Turn(layer, over, to, tokens(len(mine_T)), rows_E)


def _once(turn: _Turn, world: World) -> tuple[float, float, float]:
    """Seconds of dispatch, of this rank's experts, and of combine."""
    dist.barrier()
    there, arrived = _wall(lambda: dispatch(turn.x_TD, turn.to), world)
    busy, y_ND = _busy(turn, arrived, world)
    dist.barrier()  # the wait for the slowest is no part of combine
    back, _ = _wall(lambda: combine(y_ND, arrived, turn.to), world)
    return there, busy, back


def _wall(work: Callable[[], _T], world: World) -> tuple[float, _T]:
    before = time.perf_counter()
    result = work()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - before, result


def _busy(turn: _Turn, arrived: Arrived, world: World) -> tuple[float, Tensor]:
    """On a CPU the process's own time: its ranks share the cores."""
    turn.layer.expect(turn.rows_E)

    def work() -> Tensor:
        return turn.layer(arrived.x_ND, arrived.slots_NJ, arrived.weights_NJ)

    if not len(arrived.x_ND):
        return 0.0, work()
    if world.device.type == "cuda":
        return _wall(work, world)
    before = time.process_time()
    y_ND = work()
    return time.process_time() - before, y_ND
