"""A placement: the expert that each slot of each rank holds, for every MoE layer.

A rank has equally many slots in every layer, and slots are numbered through: rank r of R holds the
slots from r * P / R. An expert in several slots has replicas. Its choices in a forward go to them
in turn: the j-th choice, in the order of tokens and of a token's choices, to replica j mod r.

L layers, P slots, E experts, R ranks, T tokens, K choices of a token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError

Slots = NDArray[np.int32]
KIND = "moe_lens placement"


@dataclass(frozen=True)
class Placement:
    """Where the experts of a model lie.

    Attributes:
        method: How it was made: contiguous, lpt, eplb, affinity, or the name of a file.
        ranks: R, over which the experts of a layer are spread.
        nodes: Machines; ranks lie on them in equal numbers, in order.
        experts: E of every layer.
        layers: Numbers of the MoE layers.
        slots_LP: The expert in each slot, int32.

    Raises:
        ReplayError: Slots or ranks that do not divide, an expert that lies nowhere or is unknown.
    """

    method: str
    ranks: int
    nodes: int
    experts: int
    layers: tuple[int, ...]
    slots_LP: Slots

    def __post_init__(self) -> None:
        check_sizes(self.experts, self.slots_LP.shape[1], self.ranks, self.nodes)
        if len(self.slots_LP) != len(self.layers):
            raise ReplayError(
                f"a placement of {len(self.layers)} layers has {len(self.slots_LP)} rows of slots."
            )
        if len(set(self.layers)) < len(self.layers):
            raise ReplayError(f"a placement has each layer once, got layers {self.layers}.")
        for layer, slots_P in zip(self.layers, self.slots_LP, strict=True):
            if slots_P.min() < 0 or slots_P.max() >= self.experts:
                wrong = int(slots_P.min() if slots_P.min() < 0 else slots_P.max())
                raise ReplayError(
                    f"layer {layer} of the placement has expert {wrong}; experts are 0 to "
                    f"{self.experts - 1}."
                )
            held = np.bincount(slots_P, minlength=self.experts)
            if not held.all():
                raise ReplayError(
                    f"layer {layer} of the placement has no slot for expert {int(held.argmin())}: "
                    "its tokens could go nowhere."
                )

    @property
    def slots(self) -> int:
        """P, of all ranks together."""
        return int(self.slots_LP.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    def of_layer(self, layer: int, experts: int) -> Slots:
        """The expert in each slot of a layer [P].

        Args:
            layer: Its number.
            experts: That it has.

        Raises:
            ReplayError: The placement has no such layer, or is of another number of experts.
        """
        if layer not in self.layers or experts != self.experts:
            raise ReplayError(
                f"the placement ({self.method}) is of another model: it has {self.experts} experts "
                f"in each of {len(self.layers)} layers, and the trace has {experts} in layer "
                f"{layer}."
            )
        slots_P: Slots = self.slots_LP[self.layers.index(layer)]
        return slots_P


def check_sizes(experts: int, slots: int, ranks: int, nodes: int) -> None:
    """Refuse numbers that no placement can have.

    Raises:
        ReplayError: With the next numbers that would do.
    """
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise ReplayError(f"{ranks} ranks do not lie on {nodes} nodes in equal numbers.")
    if slots < experts:
        raise ReplayError(
            f"{slots} slots do not hold {experts} experts: every expert needs one slot at least."
        )
    if slots % ranks:
        more = -slots % ranks
        raise ReplayError(
            f"{slots} slots ({experts} experts and {slots - experts} replicas) do not lie on "
            f"{ranks} ranks in equal numbers: take --replicas {slots - experts + more}, or another "
            "number of ranks."
        )


def replica_of(slots_P: NDArray[Any], experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which replica of its expert each slot is, from 0 [P], and how many each expert has [E]."""
    count_E = np.bincount(slots_P, minlength=experts)
    order_P = np.argsort(slots_P, kind="stable")
    begin_E = np.concatenate([[0], np.cumsum(count_E)[:-1]])
    replica_P = np.empty(len(slots_P), np.int64)
    replica_P[order_P] = np.arange(len(slots_P)) - begin_E[slots_P[order_P]]
    return replica_P, count_E


def slots_of(
    expert_ids_TK: NDArray[Any],
    slots_P: NDArray[Any],
    experts: int,
    forward_T: NDArray[Any] | None = None,
) -> Slots:
    """The slot that computes each choice of a forward [T, K]; -1 where the choice is -1.

    Args:
        expert_ids_TK: Experts, of all tokens of the forward, in their order.
        slots_P: The expert in each slot.
        experts: E.
        forward_T: The forward of each token, from 0, where there are several.
    """
    count_E = np.bincount(slots_P, minlength=experts)
    order_P = np.argsort(slots_P, kind="stable").astype(np.int32)  # slots by expert
    begin_E = np.concatenate([[0], np.cumsum(count_E)[:-1]])
    ids_S = expert_ids_TK.reshape(-1)
    slot_S = np.full(len(ids_S), -1, np.int32)
    chosen = np.flatnonzero(ids_S >= 0)
    ids_N = ids_S[chosen]
    at_N = begin_E[ids_N]
    if len(slots_P) > experts:
        key_N = ids_N
        if forward_T is not None:
            key_N = forward_T.repeat(expert_ids_TK.shape[1])[chosen] * experts + ids_N
        at_N = at_N + _turns(key_N) % count_E[ids_N]
    slot_S[chosen] = order_P[at_N]
    return slot_S.reshape(expert_ids_TK.shape)


def _turns(key_N: NDArray[Any]) -> NDArray[np.int64]:
    """How many of the same key came before each."""
    order_N = np.argsort(key_N, kind="stable")
    rows = np.bincount(key_N)
    first = np.concatenate([[0], np.cumsum(rows)[:-1]])
    turn_N = np.empty(len(key_N), np.int64)
    turn_N[order_N] = np.arange(len(key_N)) - first[key_N[order_N]]
    return turn_N


def to_json(plan: Placement) -> dict[str, Any]:
    """A placement as it is written."""
    return {
        "kind": KIND,
        "version": 1,
        "method": plan.method,
        "ranks": plan.ranks,
        "nodes": plan.nodes,
        "experts": plan.experts,
        "slots_per_rank": plan.slots_per_rank,
        "layers": [
            {"layer": layer, "slots": slots_P.tolist()}
            for layer, slots_P in zip(plan.layers, plan.slots_LP, strict=True)
        ],
    }


def read_plan(path: Path) -> Placement:
    """A placement that `moe-lens place` wrote.

    Raises:
        ReplayError: Not such a file, or no placement could be so.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("kind") != KIND or raw.get("version") != 1:
            raise ValueError("it has another kind or version; files for engines are not read")
        rows = [[int(e) for e in layer["slots"]] for layer in raw["layers"]]
        layers = tuple(int(layer["layer"]) for layer in raw["layers"])
        slots_LP = np.array(rows, np.int32)
        if slots_LP.ndim != 2 or not slots_LP.size:
            raise ValueError("layers differ in their number of slots")
        sizes = int(raw["ranks"]), int(raw["nodes"]), int(raw["experts"])
    except OSError as e:
        raise ReplayError(f"{path} cannot be read ({e.strerror or e}).") from e
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise ReplayError(
            f"{path} is not a placement that moe-lens place wrote ({type(e).__name__}: {e})."
        ) from e
    try:
        return Placement(path.name, *sizes, layers, slots_LP)
    except ReplayError as e:
        raise ReplayError(f"{path}: {e}") from e
