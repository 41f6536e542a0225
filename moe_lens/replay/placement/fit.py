"""A placement made from a run: from its counts, and from which experts its tokens chose together.

L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.choices import choices_of, together_of
from moe_lens.replay.placement.counts import Counts, counts_of, rows_of
from moe_lens.replay.placement.methods import METHODS, place
from moe_lens.replay.placement.plan import Placement, read_plan
from moe_lens.trace.reader import RunFiles


@dataclasses.dataclass(frozen=True)
class Group:
    """An expert-parallel group.

    Attributes:
        ranks: Over which the experts of a layer are spread.
        replicas: Slots of a layer beyond one per expert.
        nodes: Machines on which the ranks lie.
    """

    ranks: int
    replicas: int = 0
    nodes: int = 1


def fitted(
    files: RunFiles,
    method: str,
    group: Group,
    counts: Counts | None = None,
) -> Placement:
    """A placement of this run's experts.

    Args:
        files: A snapshot of the run.
        method: One of `methods.METHODS`, or the path of a plan that moe-lens place wrote.
        group: Of ranks; a plan's own must be the same.
        counts: To fit to; None: those of the whole run.

    Raises:
        ReplayError: No such method, numbers that do not divide, or a plan of another model.
        TraceError: A segment cannot be read.
    """
    counts = counts or counts_of(files)
    if method not in METHODS:
        return _given(method, group, counts)
    together = None
    if method == "affinity":
        together = together_of(choices_of(rows_of(files, counts.infos), counts), counts)
    return placed(method, group, counts, together)


def placed(
    method: str, group: Group, counts: Counts, together_LEE: NDArray[np.float64] | None = None
) -> Placement:
    """A placement fitted to these counts."""
    return place(
        method,
        counts.total_LE(),
        counts.layers,
        ranks=group.ranks,
        replicas=group.replicas,
        nodes=group.nodes,
        groups=counts.infos[0].groups,
        together_LEE=together_LEE,
    )


def _given(name: str, group: Group, counts: Counts) -> Placement:
    path = Path(name)
    if path.suffix != ".json" and not path.exists():
        raise ReplayError(
            f"no way to place is called {name!r}: it is one of {', '.join(METHODS)}, or the file "
            "of a plan (moe-lens place writes one)."
        )
    plan = read_plan(path)
    if plan.ranks != group.ranks:
        raise ReplayError(f"{path} is a plan for {plan.ranks} ranks, not for {group.ranks}.")
    if group.nodes not in (1, plan.nodes):
        raise ReplayError(f"{path} is a plan for {plan.nodes} nodes, not for {group.nodes}.")
    # A plan may have more layers than are looked at, in any order.
    slots_LP = np.stack([plan.of_layer(layer, counts.experts) for layer in counts.layers])
    return dataclasses.replace(plan, layers=counts.layers, slots_LP=slots_LP)
