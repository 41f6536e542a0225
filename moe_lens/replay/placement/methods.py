"""Ways to place experts: as they are numbered, by load, by load with replicas, by co-activation.

L layers, E experts, P slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.affinity import grouped
from moe_lens.replay.placement.packing import packed, replicated
from moe_lens.replay.placement.plan import Placement, check_sizes

METHODS = ("contiguous", "lpt", "eplb", "affinity")


def place(
    method: str,
    weights_LE: NDArray[Any],
    layers: tuple[int, ...],
    *,
    ranks: int,
    replicas: int = 0,
    nodes: int = 1,
    groups: int | None = None,
    together_LEE: NDArray[Any] | None = None,
) -> Placement:
    """Place the experts of every layer.

    Args:
        method: One of `METHODS`. "contiguous": in the order of their numbers, and the first ones
            once more as replicas, as engines start; weights do not count. "lpt": heaviest first
            onto the lightest rank, over all ranks at once. "eplb": DeepSeek's: groups of experts
            onto nodes, then replicas and ranks within a node; as "lpt" where groups do not divide
            by nodes. "affinity": experts that tokens choose together onto one rank, as long as no
            rank gets much more than its share.
        weights_LE: What each expert has to do: tokens, in any unit.
        layers: Their numbers.
        ranks: R.
        replicas: Slots beyond one per expert, of each layer.
        nodes: Machines on which the ranks lie.
        groups: Groups of experts among which the router chooses first; None: one.
        together_LEE: For "affinity": how often two experts were chosen by one token.

    Raises:
        ReplayError: No such method, or numbers that no placement can have.
    """
    experts = weights_LE.shape[1]
    slots = experts + replicas
    check_sizes(experts, slots, ranks, nodes)
    if method == "contiguous":
        slots_LP = np.tile(np.arange(slots) % experts, (len(weights_LE), 1))
    elif method == "lpt":
        slots_LP = _by_load(weights_LE, slots, 1, 1, ranks)
    elif method == "eplb":
        whole = (groups or 1) % nodes == 0 and experts % (groups or 1) == 0
        sizes = (groups or 1, nodes) if whole else (1, 1)
        slots_LP = _by_load(weights_LE, slots, *sizes, ranks)
    elif method == "affinity":
        if together_LEE is None:
            raise ReplayError("affinity needs rows per token: which experts tokens chose together.")
        slots_LP = grouped(weights_LE, together_LEE, slots, nodes, ranks)
    else:
        raise ReplayError(f"no way to place is called {method!r}: {', '.join(METHODS)}.")
    return Placement(method, ranks, nodes, experts, layers, slots_LP.astype(np.int32))


def _by_load(
    weights_LE: NDArray[Any], slots: int, groups: int, nodes: int, ranks: int
) -> NDArray[np.int64]:
    """EPLB's hierarchy: groups onto nodes, replicas within a node, replicas onto its ranks.

    With one group and one node it is its global balancing.
    """
    layers, experts = weights_LE.shape
    size = experts // groups
    group_LG = packed(weights_LE.reshape(layers, groups, size).sum(2), nodes)
    # Experts in the order of their nodes: a row for each layer and node.
    expert_LE = (group_LG[:, :, None] * size + np.arange(size)).reshape(layers, experts)
    expert_XN = expert_LE.reshape(layers * nodes, experts // nodes)
    weight_XN = np.take_along_axis(weights_LE, expert_LE, 1).reshape(expert_XN.shape)
    item_XP, count_XN = replicated(weight_XN, slots // nodes)
    weight_XP = np.take_along_axis(weight_XN / count_XN, item_XP, 1)
    order_XP = packed(weight_XP, ranks // nodes)
    item_XP = np.take_along_axis(item_XP, order_XP, 1)
    return np.take_along_axis(expert_XN, item_XP, 1).reshape(layers, slots)
