"""The placement that a replay asks about, and experts in their order to compare it with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_lens.errors import ReplayError
from moe_lens.replay.ep.settings import Parallel
from moe_lens.replay.ep.world import World
from moe_lens.replay.placement.counts import counts_of, placed_layers
from moe_lens.replay.placement.fit import Group, fitted
from moe_lens.replay.placement.methods import METHODS, place
from moe_lens.replay.placement.plan import Placement
from moe_lens.trace.reader import RunFiles

CONTIGUOUS = "contiguous"


def plans_of(files: RunFiles, parallel: Parallel, layers: frozenset[int]) -> list[Placement]:
    """The placement, and behind it `contiguous` without replicas, where that is another one.

    With replicas a method's name has their number behind it: eplb+16.

    Raises:
        ReplayError: A placement that does not fit.
        TraceError: A segment cannot be read.
    """
    method, replicas = parallel.placement, parallel.replicas
    infos = placed_layers(files, layers)
    numbers, experts = tuple(info.layer for info in infos), infos[0].experts
    if method == CONTIGUOUS:
        plan = _contiguous(numbers, experts, Group(parallel.ranks, replicas, parallel.nodes))
    else:
        group = Group(parallel.ranks, replicas, parallel.nodes)
        plan = fitted(files, method, group, counts_of(files, layers=layers))
    if method in METHODS and replicas:
        plan = replace(plan, method=f"{method}+{replicas}")
    if plan.method == CONTIGUOUS or experts % plan.ranks:
        return [plan]
    return [plan, _contiguous(numbers, experts, Group(plan.ranks, 0, plan.nodes))]


def _contiguous(layers: tuple[int, ...], experts: int, group: Group) -> Placement:
    alike_LE = np.ones((len(layers), experts), np.int64)  # by number: no load counts
    return place(
        CONTIGUOUS,
        alike_LE,
        layers,
        ranks=group.ranks,
        replicas=group.replicas,
        nodes=group.nodes,
    )


def check_world(parallel: Parallel, world: World) -> None:
    """Refuse another number of processes than ranks, and what only a modelled exchange has.

    Raises:
        ReplayError: With what is wrong.
    """
    if world.size != parallel.ranks:
        raise ReplayError(
            f"--ep {parallel.ranks} takes {parallel.ranks} processes, and {world.size} were "
            "started: each is a rank."
        )
    for option, given in (
        ("--dispatch-dtype", parallel.dispatch_dtype),
        ("--all-to-all", parallel.all_to_all),
    ):
        if given is not None:
            raise ReplayError(
                f"{option} {given} is of the modelled all-to-all; processes exchange rows as they "
                "are. Leave it out, or simulate."
            )
