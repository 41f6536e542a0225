"""What is done with the choices of a router before experts run: capacity, drops, rerouting, top-k.

`recorded` runs what ran: a slot that was dropped stays dropped. The others start from the choices
themselves: `dropless` runs all, `drop` drops what finds its expert full, `reroute` offers that to
the token's recorded runners-up first. Deciding is not part of any timing.

T tokens, K choices of a token, M runners-up, E experts, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.errors import ReplayError
from moe_lens.replay.routing import Floats, Ids, Routed
from moe_lens.runtime import ops
from moe_lens.runtime.checks import check_ids
from moe_lens.trace.meta import LayerInfo

POLICIES = ("recorded", "dropless", "drop", "reroute")
CAPACITY_FACTOR = 1.25


@dataclass(frozen=True)
class Policy:
    """One of `POLICIES`, and its numbers.

    Attributes:
        capacity_factor: Of `drop` and `reroute` (None: `CAPACITY_FACTOR`): an expert takes
            C = ceil(factor * choices / E), where choices are the T * K of a batch that has no zero
            experts and no dynamic k.
        by: What an expert that is full prefers: "position" (tokens that come first) or "prob" (the
            larger recorded gate weight).
        top_k: Keep so many choices of each token, those of the largest gate weights. None: all.
    """

    name: str = "recorded"
    capacity_factor: float | None = None
    by: str = "position"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ReplayError(
                f"There is no policy {self.name!r}: it is one of {', '.join(POLICIES)}."
            )
        if self.by not in ("position", "prob"):
            raise ReplayError(f"A full expert prefers by position or prob, not by {self.by!r}.")
        if self.capped and self.capacity_factor is None:
            object.__setattr__(self, "capacity_factor", CAPACITY_FACTOR)
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ReplayError(f"A capacity factor is above 0, got {self.capacity_factor:g}.")
        if self.top_k is not None and self.top_k < 1:
            raise ReplayError(f"top_k is 1 or more, got {self.top_k}.")

    @property
    def capped(self) -> bool:
        return self.name in ("drop", "reroute")


@dataclass(frozen=True)
class Work:
    """What experts compute for one layer in one forward.

    Attributes:
        expert_ids_TK: int32; -1: no expert runs.
        weights_TK: float32.
        slots: Choices of experts that compute, before drops: kept and dropped ones.
        dropped: Of those, dropped.
        rerouted: Of those, computed by a runner-up.
    """

    expert_ids_TK: Ids
    weights_TK: Floats
    slots: int
    dropped: int
    rerouted: int


def apply(policy: Policy, routed: Routed, info: LayerInfo) -> Work:
    """Decide which expert runs for which slot.

    Raises:
        ReplayError: Rerouting without recorded runners-up, or by weights that were not recorded.
        RuntimeInputError: A token has an expert twice.
    """
    if policy.top_k is not None and policy.top_k < routed.expert_ids_TK.shape[1]:
        if routed.unweighted:
            raise ReplayError(
                f"{_where(routed)}: {routed.unweighted:,} tokens have no recorded gate weights, so "
                "which of their choices are the largest is not known. Leave out --top-k."
            )
        routed = _fewer(routed, policy.top_k, info)
    wanted = int((routed.expert_ids_TK >= 0).sum())
    if policy.capped:
        return _capped(policy, routed, info, wanted)
    ids_TK = routed.expert_ids_TK
    if policy.name == "recorded":
        ids_TK = np.where(routed.dropped_TK, -1, ids_TK).astype(np.int32)
    if ids_TK.shape[1]:
        check_ids(torch.from_numpy(ids_TK), info.experts)
    return Work(ids_TK, routed.weights_TK, wanted, wanted - int((ids_TK >= 0).sum()), 0)


def room(policy: Policy, choices: int, experts: int) -> int:
    """C, the slots that one expert takes."""
    assert policy.capacity_factor is not None
    # Rounded first: 1.1 * 40 is 44.00000000000001, and its ceiling 45.
    return math.ceil(round(policy.capacity_factor * choices / experts, 9))


def _capped(policy: Policy, routed: Routed, info: LayerInfo, wanted: int) -> Work:
    next_ids_TM = next_weights_TM = None
    if policy.by == "prob" and routed.unweighted:
        raise ReplayError(
            f"{_where(routed)}: {routed.unweighted:,} tokens have no recorded gate weights, so an "
            "expert cannot prefer by them. Take --priority position."
        )
    if policy.name == "reroute":
        next_ids_TM, next_weights_TM = _runners_up(policy, routed)
    ids_TK, weights_TK = torch.from_numpy(routed.expert_ids_TK), routed.weights_TK
    if not ids_TK.numel():
        return Work(routed.expert_ids_TK, weights_TK, 0, 0, 0)
    check_ids(ids_TK, info.experts, _tensor(next_ids_TM))
    placed = ops.capacity(
        ids_TK,
        info.experts,
        room(policy, wanted, info.experts),
        by=policy.by,
        priority_TK=torch.from_numpy(weights_TK) if policy.by == "prob" else None,
        next_ids_TM=_tensor(next_ids_TM),
        next_priority_TM=_tensor(next_weights_TM) if policy.by == "prob" else None,
    )
    kept_TK: Ids = placed.expert_ids_TK.numpy()
    runner_up_TK: Ids = placed.runner_up_TK.numpy()
    if next_weights_TM is not None:
        theirs_TK = np.take_along_axis(next_weights_TM, runner_up_TK.clip(min=0), axis=1)
        known_TK = (runner_up_TK >= 0) & ~np.isnan(theirs_TK)
        weights_TK = np.where(known_TK, theirs_TK, weights_TK).astype(np.float32)
    dropped = wanted - int((kept_TK >= 0).sum())
    return Work(kept_TK, weights_TK, wanted, dropped, int((runner_up_TK >= 0).sum()))


def _runners_up(policy: Policy, routed: Routed) -> tuple[Ids, Floats]:
    ids_TM, weights_TM = routed.next_ids_TM, routed.next_weights_TM
    if ids_TM is None or weights_TM is None:
        raise ReplayError(
            f"{_where(routed)}: no runners-up were recorded (next_ids), so there is nowhere to "
            "reroute to. Take --policy drop; or a trace recorded with tokens=1.0, of a router that "
            "ranks its experts (where rec.log is used, give it the logits)."
        )
    unknown = int(np.isnan(weights_TM[ids_TM >= 0]).sum())
    if policy.by == "prob" and unknown:
        raise ReplayError(
            f"{_where(routed)}: {unknown:,} runners-up have no recorded weight (next_weights), so "
            "an expert cannot prefer by it. Take --priority position."
        )
    if policy.by == "prob":
        weights_TM = np.where(ids_TM >= 0, weights_TM, 0).astype(np.float32)
    return ids_TM, weights_TM


def _fewer(routed: Routed, top_k: int, info: LayerInfo) -> Routed:
    """The choices of the largest weights (of equal ones, the earlier), in their old order.

    The others become the first runners-up, best first: they are what a router that takes fewer
    would name next.
    """
    weights_TK = np.where(_chosen(routed), routed.weights_TK, -np.inf)
    order_TK = np.argsort(-weights_TK, axis=1, kind="stable")
    keep_TN = np.sort(order_TK[:, :top_k], axis=1)
    rest_TR = order_TK[:, top_k:]
    ids_TN = np.take_along_axis(routed.expert_ids_TK, keep_TN, axis=1)
    kept_TN = np.take_along_axis(routed.weights_TK, keep_TN, axis=1)
    if info.normalised:
        sum_T1 = kept_TN.sum(axis=1, keepdims=True)
        kept_TN = np.divide(kept_TN, sum_T1, out=np.zeros_like(kept_TN), where=sum_T1 > 0)
    next_ids_TM = np.take_along_axis(routed.expert_ids_TK, rest_TR, axis=1)
    next_weights_TM = np.take_along_axis(routed.weights_TK, rest_TR, axis=1)
    if routed.next_ids_TM is not None and routed.next_weights_TM is not None:
        next_ids_TM = np.concatenate([next_ids_TM, routed.next_ids_TM], axis=1)
        next_weights_TM = np.concatenate([next_weights_TM, routed.next_weights_TM], axis=1)
    return replace(
        routed,
        expert_ids_TK=ids_TN,
        weights_TK=kept_TN,
        dropped_TK=np.take_along_axis(routed.dropped_TK, keep_TN, axis=1),
        next_ids_TM=next_ids_TM,
        next_weights_TM=next_weights_TM,
    )


def _chosen(routed: Routed) -> NDArray[np.bool_]:
    """Slots that hold a choice, those of zero experts too, which have a weight and no expert."""
    chosen_TK: NDArray[np.bool_] = (routed.expert_ids_TK >= 0) | (routed.weights_TK != 0)
    return chosen_TK


def _tensor(array: Ids | Floats | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _where(routed: Routed) -> str:
    return f"layer {routed.layer}, step {routed.step}"
