"""What a trace recorded of a layer in a forward, as the batch that a replay runs.

T tokens, K choices of a token, M runners-up. A token that has fewer choices than others (dynamic k)
and choices of experts that compute nothing (zero experts) leave -1 in their slots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay import tables
from moe_lens.replay.choose import Forward
from moe_lens.replay.index import Index, beginnings, padding_of
from moe_lens.trace.meta import LayerInfo

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]

CHUNK = 500_000
"""Rows that are read at a time, at most (one forward, where that alone has more)."""

LISTS = ("expert_ids", "weights", "next_ids", "next_weights", "dropped")
"""Columns of a token's choices."""


@dataclass(frozen=True)
class Routed:
    """One layer in one forward, as it was recorded.

    Attributes:
        expert_ids_TK: int32, in the order the experts received them; -1: no expert computes.
        weights_TK: float32 gate weights; where none was recorded, one over the token's choices.
        unweighted: Tokens whose weights are not recorded ones.
        dropped_TK: True: no expert computed this slot when it was recorded.
        next_ids_TM: int32 runners-up, best first; -1: none, or one that computes nothing, or one of
            the token's own experts. None: none was recorded.
        next_weights_TM: float32, the weights they would have had; NaN where not recorded.
    """

    rank: int
    layer: int
    step: int
    forward: int
    phase: str
    expert_ids_TK: Ids
    weights_TK: Floats
    unweighted: int
    dropped_TK: NDArray[np.bool_]
    next_ids_TM: Ids | None
    next_weights_TM: Floats | None

    @property
    def tokens(self) -> int:
        return len(self.expert_ids_TK)


def read(
    index: Index,
    layers: Collection[int],
    forwards: Sequence[Forward],
    *,
    chunk: int = CHUNK,
    lists: Sequence[str] = LISTS,
) -> Iterator[list[Routed]]:
    """These layers in each of these forwards, in their order; layers that did not run are left out.

    Args:
        index: Of the run.
        layers: Which.
        forwards: Which, those of a rank together.
        chunk: At most so many rows are in memory, or those of one forward.
        lists: Of `LISTS`, the columns that are read; the others are as if nothing was recorded.

    Raises:
        TraceError: A segment cannot be read.
        ReplayError: Rows contradict each other.
    """
    waiting: list[Forward] = []
    for forward in forwards:
        rows = sum(f.tokens for f in waiting) + forward.tokens
        if waiting and (rows * len(layers) > chunk or forward.rank != waiting[0].rank):
            yield from _chunk(index, layers, waiting, lists)
            waiting = []
        waiting.append(forward)
    if waiting:
        yield from _chunk(index, layers, waiting, lists)


def _chunk(
    index: Index, layers: Collection[int], forwards: Sequence[Forward], lists: Sequence[str]
) -> Iterator[list[Routed]]:
    """Forwards of one rank."""
    rank = forwards[0].rank
    infos = {n: index.infos[rank, n] for n in sorted(layers) if (rank, n) in index.infos}
    steps = sorted({f.step for f in forwards})
    only = (
        pc.field("layer").isin(list(infos))
        & (pc.field("step") >= steps[0])
        & (pc.field("step") <= steps[-1])
        & pc.field("step").isin(steps)
    )
    names = ("step", "forward", "layer", "token", *lists)
    found = tables.rows(index.files, "routing", rank, names, only)
    keys = [found[name].to_numpy() for name in ("step", "forward", "layer", "token")]
    order = np.lexsort(keys[::-1])
    found, keys = found.take(pa.array(order)), [key[order] for key in keys[:3]]
    begin = beginnings(keys)
    length = np.diff(begin, append=len(order))
    of = zip(*(key[begin].tolist() for key in keys), strict=True)
    at = dict(zip(of, zip(begin.tolist(), length.tolist(), strict=True), strict=True))
    streams = {info.stream for info in infos.values()}
    pads = {stream: padding_of(index, rank, stream, steps) for stream in streams}
    for forward in forwards:
        routed = []
        for number, info in infos.items():
            where = at.get((forward.step, forward.forward, number))
            if where is not None:
                own = found.slice(*where)
                if padding := pads[info.stream].get((forward.step, forward.forward)):
                    own = own.filter(pc.invert(pc.is_in(own["token"], pa.array(padding))))
                routed.append(_routed(own, rank, info, forward))
        yield routed


def _routed(rows: pa.Table, rank: int, info: LayerInfo, forward: Forward) -> Routed:
    where = f"rank {rank}, layer {info.layer}, step {forward.step}, forward {forward.forward}"
    columns = {name: _column(rows, name) for name in LISTS}
    count_T, ids_TK = _padded(columns["expert_ids"], -1, np.int32, least=1)
    tokens, top_k = ids_TK.shape
    chosen_TK = np.arange(top_k) < count_T[:, None]
    weight_count_T, weights = _padded(columns["weights"], np.nan, np.float32)
    if weights.shape[1] > top_k:
        raise ReplayError(f"{where}: a token has more weights than choices: the trace is damaged.")
    weights_TK = np.full((tokens, top_k), np.nan, np.float32)
    weights_TK[:, : weights.shape[1]] = weights
    unknown_T = (np.isnan(weights_TK) & chosen_TK).any(1) | (weight_count_T != count_T)
    weights_TK[unknown_T] = (1 / np.maximum(count_T[unknown_T], 1))[:, None]
    next_ids_TM, next_weights_TM = _runners_up(columns, ids_TK, info.experts)
    return Routed(
        rank=rank,
        layer=info.layer,
        step=forward.step,
        forward=forward.forward,
        phase=forward.phase,
        expert_ids_TK=np.where(ids_TK < info.experts, ids_TK, -1).astype(np.int32),
        weights_TK=np.where(chosen_TK, weights_TK, 0).astype(np.float32),
        unweighted=int(unknown_T.sum()),
        dropped_TK=_slots(columns["dropped"], (tokens, top_k), where),
        next_ids_TM=next_ids_TM,
        next_weights_TM=next_weights_TM,
    )


def _runners_up(
    columns: dict[str, pa.ListArray], ids_TK: Ids, experts: int
) -> tuple[Ids | None, Floats | None]:
    count_T, ids_TM = _padded(columns["next_ids"], -1, np.int32)
    if not count_T.any():
        return None, None
    # A choice that was rerouted when it was recorded stands among the choices, and may stand here.
    own_TM = (ids_TM[:, :, None] == ids_TK[:, None, :]).any(2)
    ids_TM = np.where(own_TM | (ids_TM >= experts), -1, ids_TM).astype(np.int32)
    weights_TM = np.full(ids_TM.shape, np.nan, np.float32)
    _, given = _padded(columns["next_weights"], np.nan, np.float32)
    width = min(given.shape[1], ids_TM.shape[1])
    weights_TM[:, :width] = given[:, :width]
    return ids_TM, weights_TM


def _column(rows: pa.Table, name: str) -> pa.ListArray:
    if name not in rows.column_names:
        return pa.nulls(rows.num_rows, pa.list_(pa.int32()))
    column = rows.column(name)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _padded(
    lists: pa.ListArray, blank: float, dtype: Any, *, least: int = 0
) -> tuple[NDArray[np.int64], Any]:
    """How long each list is (null: 0), and the lists as rows filled up with `blank`.

    Rows are as long as the longest list, and `least` at least.
    """
    count_T = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    count_T = count_T.astype(np.int64)
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    padded = np.full((len(lists), int(count_T.max(initial=least))), blank, dtype)
    padded[np.arange(padded.shape[1]) < count_T[:, None]] = values
    return count_T, padded


def _slots(lists: pa.ListArray, shape: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """Lists of slots as a mask."""
    count_T, slots = _padded(lists, -1, np.int32)
    if slots.max(initial=-1) >= shape[1]:
        raise ReplayError(f"{where}: a token dropped a slot that it lacks: the trace is damaged.")
    mask = np.zeros(shape, bool)
    token_n, at_n = np.nonzero(np.arange(slots.shape[1]) < count_T[:, None])
    mask[token_n, slots[token_n, at_n]] = True
    return mask
