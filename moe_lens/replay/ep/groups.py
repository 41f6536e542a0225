"""The forwards of an expert-parallel group: what all ranks of the trace did in one forward.

Ranks of the trace are not those of the group: a trace of one process is replayed on eight ranks.
Their tokens stand one rank after the other, each rank's policy (capacity, drops) being its own.

T tokens, K choices of a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay import tables
from moe_lens.replay.choose import Forward, choose, in_turns
from moe_lens.replay.index import Index
from moe_lens.replay.policies import Policy, apply
from moe_lens.replay.routing import CHUNK, Floats, Ids, Routed, read

Key = tuple[int, int, str]
"""Step, forward, phase."""


@dataclass(frozen=True)
class Batch:
    """One layer in one forward of all ranks of the trace.

    Attributes:
        expert_ids_TK: int32 that experts compute under the policy; -1: none.
        weights_TK: float32.
        unweighted: Tokens whose weights are not recorded ones.
        recorder_T: The rank of the trace that recorded each token, from 0 in their order.
        recorders: Ranks of the trace.
    """

    layer: int
    step: int
    forward: int
    phase: str
    expert_ids_TK: Ids
    weights_TK: Floats
    unweighted: int
    recorder_T: NDArray[np.int64]
    recorders: int

    @property
    def tokens(self) -> int:
        return len(self.expert_ids_TK)


@dataclass(frozen=True)
class Chosen:
    """Forwards to replay, in the order in which they are visited.

    Attributes:
        groups: The forwards of the trace's ranks that make up each.
        recorded: Forwards with per-token rows.
        left_out: Of those, forwards that lack rows of some tokens or of a rank.
    """

    groups: list[list[Forward]]
    recorded: int
    left_out: int

    @property
    def most_tokens(self) -> int:
        """Of any forward: at most so many."""
        return max(sum(f.tokens for f in group) for group in self.groups)


def choose_groups(index: Index, most: int | None, *, partial: bool = False) -> Chosen:
    """Choose forwards of which every rank has the rows of all its tokens.

    Args:
        index: What there is.
        most: Of each phase; None: all.
        partial: Take those too that lack rows.

    Raises:
        ReplayError: There is none.
    """
    every = _by_key(choose(index, None, partial=True).forwards)
    usable = every
    if not partial:
        usable = _by_key(choose(index, None).forwards)  # raises where no rank has one
        expected = _ranks_of(index)
        usable = {
            key: group
            for key, group in usable.items()
            if {f.rank for f in group} >= expected.get(key[:2], set())
        }
    if not usable:
        parts = "Replay the parts as smaller batches with --partial."
        how = "Record every rank with tokens=1.0"
        raise ReplayError(
            f"{index.files.path}: of none of its {len(every):,} forwards with per-token rows has "
            "every rank the rows of all its tokens, and a part of a batch does not load ranks as "
            "the batch did. "
            + (parts if index.files.meta.imported else f"{how}, or {parts[0].lower()}{parts[1:]}")
        )
    by_phase: dict[str, list[list[Forward]]] = defaultdict(list)
    for key in sorted(usable):
        by_phase[key[2]].append(usable[key])
    groups = in_turns(by_phase, most)
    return Chosen(groups, len(every), len(every) - len(usable))


def _by_key(forwards: list[Forward]) -> dict[Key, list[Forward]]:
    """Forwards of ranks, by what they are one of, in the order of ranks."""
    found: dict[Key, list[Forward]] = defaultdict(list)
    for each in sorted(forwards, key=lambda f: f.rank):
        found[each.step, each.forward, each.phase].append(each)
    return found


def _ranks_of(index: Index) -> dict[tuple[int, int], set[int]]:
    """Ranks that had tokens in a forward, with MoE layers or without rows for them."""
    ranks: dict[tuple[int, int], set[int]] = defaultdict(set)
    for rank in sorted({rank for rank, _ in index.infos}):
        found = tables.rows(index.files, "steps", rank, ("step", "forward", "tokens"))
        columns = (found[name].to_pylist() for name in ("step", "forward", "tokens"))
        for step, forward, tokens in zip(*columns, strict=True):
            if tokens:
                ranks[step, forward].add(rank)
    return ranks


def batches(
    index: Index, layers: Collection[int], groups: list[list[Forward]], policy: Policy
) -> Iterator[list[Batch]]:
    """These layers in each of these forwards, in their order; layers that did not run are left out.

    Raises:
        TraceError: A segment cannot be read.
        ReplayError: Rows contradict each other, or the policy cannot be applied.
    """
    by_rank: dict[int, list[Forward]] = defaultdict(list)
    for group in groups:
        for each in group:
            by_rank[each.rank].append(each)
    chunk = max(1, CHUNK // max(1, len(by_rank)))
    readers = {r: read(index, layers, found, chunk=chunk) for r, found in by_rank.items()}
    for group in groups:
        by_layer: dict[int, list[Routed]] = defaultdict(list)
        for each in group:
            for routed in next(readers[each.rank]):
                by_layer[routed.layer].append(routed)
        yield [_joined(by_layer[layer], index, policy) for layer in sorted(by_layer)]


def _joined(parts: list[Routed], index: Index, policy: Policy) -> Batch:
    recorders = sorted({rank for rank, _ in index.infos})
    works = [apply(policy, part, index.infos[part.rank, part.layer]) for part in parts]
    top_k = max(work.expert_ids_TK.shape[1] for work in works)
    works = [
        replace(
            work,
            expert_ids_TK=_wider(work.expert_ids_TK, top_k, -1),
            weights_TK=_wider(work.weights_TK, top_k, 0),
        )
        for work in works
    ]
    return Batch(
        layer=parts[0].layer,
        step=parts[0].step,
        forward=parts[0].forward,
        phase=parts[0].phase,
        expert_ids_TK=np.concatenate([work.expert_ids_TK for work in works]),
        weights_TK=np.concatenate([work.weights_TK for work in works]),
        unweighted=sum(part.unweighted for part in parts),
        recorder_T=np.repeat(
            [recorders.index(part.rank) for part in parts], [part.tokens for part in parts]
        ),
        recorders=len(recorders),
    )


def _wider(array_TK: NDArray[Any], top_k: int, blank: int) -> NDArray[Any]:
    return np.pad(array_TK, ((0, 0), (0, top_k - array_TK.shape[1])), constant_values=blank)
