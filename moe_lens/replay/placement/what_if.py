"""Several placements of one run, judged on forwards that they were not fitted to.

T tokens, K choices of a token, L layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.stall import BYTES, expert_bytes
from moe_lens.replay.placement.balance import Balance, balance_of, rank_rows
from moe_lens.replay.placement.choices import Choices
from moe_lens.replay.placement.counts import Counts
from moe_lens.replay.placement.plan import Placement, slots_of
from moe_lens.replay.placement.traffic import Ints, leaving, sent, sources
from moe_lens.trace.meta import LayerInfo

_LEAST = 4
"""Forwards of a phase from which on it is divided into a part to fit to and one to judge by."""


@dataclass
class Bytes:
    """Rows that leave their rank or node on the way to the experts.

    Attributes:
        rows: How many.
        bytes: Of them, at each layer's dispatch width; None where the trace does not know one.
    """

    rows: int = 0
    bytes: int | None = 0

    def add(self, rows: int, row_bytes: int | None) -> None:
        """Count those of another layer."""
        self.rows += rows
        known = self.bytes is not None and row_bytes is not None
        self.bytes = (self.bytes or 0) + rows * (row_bytes or 0) if known else None


@dataclass
class Traffic:
    """What tokens send to reach their experts (dispatch); results go back the same ways (combine).

    Attributes:
        rows_RR: Rows from each rank to each, a token once for each; the diagonal stays at home.
        token_layers: Tokens times layers that were looked at.
        to_ranks: To other ranks, a token once for each of them.
        to_ranks_by_choice: To other ranks, a token once for each choice.
        to_nodes, to_nodes_by_choice: To other nodes.
    """

    rows_RR: Ints
    token_layers: int = 0
    to_ranks: Bytes = field(default_factory=Bytes)
    to_ranks_by_choice: Bytes = field(default_factory=Bytes)
    to_nodes: Bytes = field(default_factory=Bytes)
    to_nodes_by_choice: Bytes = field(default_factory=Bytes)


def divided(counts: Counts) -> tuple[Counts, Counts]:
    """The forwards to fit to, and the later ones to judge by: the two halves of each phase.

    A phase of fewer than four forwards is in both: what is said of it then flatters.
    """
    earlier, later = [], []
    for phase in counts.phases:
        of = [i for i, key in enumerate(counts.forwards) if key[2] == phase]
        half = len(of) // 2 if len(of) >= _LEAST else None
        earlier += of[:half]
        later += of[half:] if half else of
    return counts.at(sorted(earlier)), counts.at(sorted(later))


def balances(counts: Counts, placement: Placement) -> dict[str, Balance]:
    """How even the ranks' rows are, for each phase in which experts computed anything.

    Raises:
        ReplayError: The placement is of another model.
    """
    found = {}
    for phase in counts.phases:
        rows_FLR = rank_rows(counts.of_phase(phase), placement)
        if rows_FLR.any():
            top_ks = {info.top_k for info in counts.infos}
            top_k = top_ks.pop() if len(top_ks) == 1 else None
            found[phase] = balance_of(rows_FLR, counts.experts, top_k)
    return found


def traffic_of(
    choices: dict[int, Choices],
    infos: Sequence[LayerInfo],
    placement: Placement,
    *,
    dtype: str = "bfloat16",
) -> Traffic:
    """What tokens send under a placement.

    A token starts on the rank that recorded it, where the trace has as many ranks as the placement;
    otherwise the tokens of a forward are dealt out to the ranks in equal parts, in their order.

    Args:
        choices: By layer.
        infos: The layers.
        placement: Of their experts.
        dtype: Of an element that is sent, a key of `moe_lens.metrics.stall.BYTES`.
    """
    made = Traffic(np.zeros((placement.ranks, placement.ranks), np.int64))
    for info in infos:
        if info.layer not in choices:
            continue
        of = choices[info.layer]
        slots_P = placement.of_layer(info.layer, info.experts)
        slot_TK = slots_of(of.expert_ids_TK, slots_P, info.experts, of.forward_T)
        rows = sent(slot_TK, _sources(of, placement.ranks), placement)
        width = info.dispatch_width or info.hidden_size
        size = None if width is None else int(width * BYTES[dtype])
        made.token_layers += len(slot_TK)
        made.rows_RR += rows.ranks_RR
        made.to_ranks.add(leaving(rows.ranks_RR), size)
        made.to_ranks_by_choice.add(leaving(rows.choices_RR), size)
        made.to_nodes.add(leaving(rows.nodes_NN), size)
        made.to_nodes_by_choice.add(leaving(rows.choices_NN), size)
    return made


def _sources(of: Choices, ranks: int) -> Ints:
    """The rank on which each token starts."""
    if len(np.unique(of.rank_T)) == ranks > 1:
        return np.unique(of.rank_T, return_inverse=True)[1]
    tokens_F = np.bincount(of.forward_T)
    return np.concatenate([sources(int(n), ranks) for n in tokens_F])


def held_bytes(placement: Placement, infos: Sequence[LayerInfo], bytes_L: NDArray[np.int64]) -> int:
    """Weights of all layers' experts on the rank that holds most.

    Weights that layers share are held once on a rank (`LayerInfo.identities`).

    Args:
        placement: Of their experts.
        infos: The layers, in the placement's order.
        bytes_L: Of one expert of each layer.
    """
    if all(info.identities is None for info in infos):
        return int(bytes_L.sum()) * placement.slots_per_rank
    named = [info.named for info in infos]
    held: list[int] = []
    for rank in range(placement.ranks):
        at = slice(rank * placement.slots_per_rank, (rank + 1) * placement.slots_per_rank)
        slots = zip(placement.slots_LP[:, at], named, bytes_L.tolist(), strict=True)
        whose = {names[e]: size for experts, names, size in slots for e in experts}
        held.append(sum(whose.values()))
    return max(held)


def weight_bytes(infos: Sequence[LayerInfo], dtype: str) -> NDArray[np.int64] | None:
    """Weights of one expert of each layer, bytes [L]; None where sizes are unknown.

    Args:
        infos: The layers.
        dtype: Of a weight, a key of `moe_lens.metrics.stall.BYTES`.
    """
    sizes = [(info.hidden_size, info.intermediate_size) for info in infos]
    if any(hidden is None or inner is None for hidden, inner in sizes):
        return None
    return np.array([expert_bytes(hidden or 0, inner or 0, dtype) for hidden, inner in sizes], int)
