"""Several placements of one run, judged on forwards that they were not fitted to.

T tokens, K choices of a token, L layers, R ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.choose import Forward
from moe_lens.replay.index import Index, index_of
from moe_lens.replay.placement.balance import Balance, balance_of, rank_rows
from moe_lens.replay.placement.counts import Counts, rank_forwards
from moe_lens.replay.placement.fit import TOKENS, within
from moe_lens.replay.placement.plan import Placement, slots_of
from moe_lens.replay.placement.traffic import Ints, matrix, sent, sources
from moe_lens.replay.routing import Ids, Routed, read
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import RunFiles

_LEAST = 4
"""Forwards of a phase from which on it is divided into a part to fit to and one to judge by."""


@dataclass(frozen=True)
class Sent:
    """Rows that leave their rank or node on the way to the experts, and their bytes.

    Attributes:
        rows: How many.
        bytes: Of them, at each layer's dispatch width; None where the trace does not know one.
    """

    rows: int = 0
    bytes: int | None = 0

    def plus(self, rows: int, row_bytes: int | None) -> Sent:
        """With those of another layer or forward."""
        if self.bytes is None or row_bytes is None:
            return Sent(self.rows + rows, None)
        return Sent(self.rows + rows, self.bytes + rows * row_bytes)


@dataclass
class Traffic:
    """What tokens send to reach their experts (dispatch); results go back the same ways (combine).

    Attributes:
        token_layers: Tokens times layers that were looked at.
        to_ranks: To other ranks, a token once for each of them.
        to_ranks_by_choice: To other ranks, a token once for each choice.
        to_nodes, to_nodes_by_choice: To other nodes.
        rows_RR: Rows from each rank to each, a token once for each; the diagonal stays at home.
    """

    token_layers: int
    to_ranks: Sent
    to_ranks_by_choice: Sent
    to_nodes: Sent
    to_nodes_by_choice: Sent
    rows_RR: Ints


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
            found[phase] = balance_of(rows_FLR)
    return found


def traffic_of(
    files: RunFiles,
    counts: Counts,
    placements: Sequence[Placement],
    *,
    itemsize: int = 2,
    tokens: int = TOKENS,
) -> list[Traffic] | None:
    """What each placement sends; None without rows per token.

    A token starts on the rank that recorded it, where the trace has as many ranks as the placement;
    otherwise the tokens of a forward are dealt out to the ranks in equal parts, in their order.

    Args:
        files: A snapshot of the run.
        counts: Of the forwards that may be looked at.
        placements: To compare.
        itemsize: Bytes of an element that is sent.
        tokens: At most about so many of each layer, of forwards evenly spread.

    Raises:
        TraceError: A segment cannot be read.
    """
    try:
        index = index_of(files, layers=frozenset(counts.layers))
    except ReplayError:  # no rows per token
        return None
    found = [_Sum(placement) for placement in placements]
    infos = {info.layer: info for info in counts.infos}
    for layer, ids_TK, rank_T in _batches(index, counts, tokens):
        for each in found:
            each.add(infos[layer], ids_TK, rank_T, itemsize)
    return [each.traffic() for each in found] if any(each.token_layers for each in found) else None


def _batches(index: Index, counts: Counts, tokens: int) -> Iterator[tuple[int, Ids, Ints]]:
    """Layer, choices and recorded rank of the tokens of whole forwards, all ranks together."""
    by_site: dict[tuple[int, int], list[Forward]] = defaultdict(list)
    for forward in rank_forwards(index, set(counts.forwards)):
        by_site[forward.step, forward.forward].append(forward)
    chosen = within([by_site[site] for site in sorted(by_site)], tokens)
    in_turn = sorted((f for of_ranks in chosen for f in of_ranks), key=lambda f: f.key)
    parts: dict[tuple[int, int, int], list[Routed]] = defaultdict(list)
    for found in read(index, list(counts.layers), in_turn):
        for routed in found:
            parts[routed.step, routed.forward, routed.layer].append(routed)
    for (_, _, layer), of_ranks in parts.items():
        width = max(routed.expert_ids_TK.shape[1] for routed in of_ranks)
        ids_TK = np.concatenate([_wide(routed.expert_ids_TK, width) for routed in of_ranks])
        rank_T = np.concatenate([np.full(routed.tokens, routed.rank) for routed in of_ranks])
        yield layer, ids_TK, rank_T


def _wide(ids_TK: Ids, width: int) -> Ids:
    return np.pad(ids_TK, ((0, 0), (0, width - ids_TK.shape[1])), constant_values=-1)


class _Sum:
    """The traffic of one placement, layer by layer."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.token_layers = 0
        self.sent = {(nodes, dedup): Sent() for nodes in (False, True) for dedup in (False, True)}
        self.rows_RR: Ints = np.zeros((placement.ranks, placement.ranks), np.int64)

    def add(self, info: LayerInfo, ids_TK: Ids, rank_T: Ints, itemsize: int) -> None:
        placement = self.placement
        slots_P = placement.of_layer(info.layer, info.experts)
        slot_TK = slots_of(ids_TK, slots_P, info.experts)
        recorded = len(np.unique(rank_T)) == placement.ranks > 1
        source_T = rank_T if recorded else sources(len(ids_TK), placement.ranks)
        width = info.dispatch_width or info.hidden_size
        for (nodes, dedup), so_far in self.sent.items():
            rows_BB = matrix(slot_TK, source_T, placement, dedup=dedup, nodes=nodes)
            bytes_per_row = None if width is None else width * itemsize
            self.sent[nodes, dedup] = so_far.plus(sent(rows_BB), bytes_per_row)
            if dedup and not nodes:
                self.rows_RR += rows_BB
        self.token_layers += len(ids_TK)

    def traffic(self) -> Traffic:
        return Traffic(
            token_layers=self.token_layers,
            to_ranks=self.sent[False, True],
            to_ranks_by_choice=self.sent[False, False],
            to_nodes=self.sent[True, True],
            to_nodes_by_choice=self.sent[True, False],
            rows_RR=self.rows_RR,
        )


def expert_bytes(infos: Sequence[LayerInfo], itemsize: int) -> NDArray[np.int64] | None:
    """Weights of one expert of each layer, bytes [L]: three matrices; None where sizes are unknown.

    Args:
        infos: The layers.
        itemsize: Bytes of a weight.
    """
    sizes = [(info.hidden_size, info.intermediate_size) for info in infos]
    if any(hidden is None or inner is None for hidden, inner in sizes):
        return None
    return np.array([3 * (hidden or 0) * (inner or 0) * itemsize for hidden, inner in sizes])
