"""A placement made from a run: from its counts, and from which experts its tokens chose together.

T tokens, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.choose import Forward
from moe_lens.replay.index import index_of
from moe_lens.replay.placement.counts import Counts, counts_of, rank_forwards
from moe_lens.replay.placement.methods import METHODS, place
from moe_lens.replay.placement.plan import Placement, read_plan
from moe_lens.replay.routing import read
from moe_lens.trace.reader import RunFiles

TOKENS = 20_000
"""Tokens of each layer from which it is learned which experts are chosen together."""


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
    together = together_of(files, counts) if method == "affinity" else None
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
    for layer in counts.layers:
        plan.of_layer(layer, counts.experts)
    return plan


def together_of(
    files: RunFiles, counts: Counts, *, tokens: int = TOKENS
) -> NDArray[np.float64] | None:
    """How often a token chose both of two experts [L, E, E]; None without rows per token.

    Args:
        files: A snapshot of the run.
        counts: Of the forwards that may be looked at.
        tokens: At most so many of each layer, of whole forwards evenly spread.

    Raises:
        TraceError: A segment cannot be read.
    """
    try:
        index = index_of(files, layers=frozenset(counts.layers))
    except ReplayError:  # no rows per token
        return None
    every = [[forward] for forward in rank_forwards(index, set(counts.forwards))]
    forwards = [forward for of_ranks in within(every, tokens) for forward in of_ranks]
    if not forwards:
        return None
    layer_at = {layer: i for i, layer in enumerate(counts.layers)}
    together_LEE = np.zeros((len(layer_at), counts.experts, counts.experts))
    for found in read(index, list(layer_at), forwards):
        for routed in found:
            ids_TK = routed.expert_ids_TK[:tokens]
            chose_TE = np.zeros((len(ids_TK), counts.experts + 1), np.float32)
            np.put_along_axis(chose_TE, ids_TK.astype(np.int64), 1, axis=1)  # -1: the last column
            chose_TE = chose_TE[:, : counts.experts]
            together_LEE[layer_at[routed.layer]] += chose_TE.T @ chose_TE
    return together_LEE


def within(forwards: list[list[Forward]], tokens: int) -> list[list[Forward]]:
    """Forwards evenly spread, each as what every rank did, of about `tokens` tokens together."""
    if not forwards:
        return []
    mean = sum(f.tokens for of_ranks in forwards for f in of_ranks) / len(forwards)
    most = max(1, min(len(forwards), round(tokens / max(mean, 1))))
    return [forwards[(2 * i + 1) * len(forwards) // (2 * most)] for i in range(most)]
