"""The decisions that a trace holds, read from its files: no database, no views.

Legend: N rows of a table, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moe_lens.errors import SteeringError
from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens.trace.reader import RunFiles, open_run, superseded_from
from moe_lens_hooks.steering.choice import OWN

_AT = ["attempt", "step", "forward"]
_TOKENS = [*_AT, "stream", "token", "sequence", "position", "padding", "token_id"]
_ROUTING = [*_AT, "layer", "token", "expert_ids", "router_ids"]
_SEQUENCES = [*_AT, "sequence", "request", "parent"]
_OUTCOMES = [*_AT, "sequence", "position", "kept"]
_STEPS = [*_AT, "tokens", "padding_tokens"]


@dataclass
class LayerRows:
    """The decisions of one layer, in the order in which they were made.

    Attributes:
        info: What the trace says of the layer.
        at_N: Number of the forward (among those read) in the high 32 bits, token in the low.
        ids_NK: int32; `OWN` in the slots that hold no choice.
        weights_NK: float32, as the experts received them; None: not read.
    """

    info: LayerInfo
    at_N: NDArray[np.int64]
    ids_NK: NDArray[np.int32]
    weights_NK: NDArray[np.float32] | None

    def of_forward(self, number: int) -> tuple[int, int]:
        """First row of a forward, and the first that is no longer of it."""
        first, last = np.searchsorted(self.at_N, [number << 32, (number + 1) << 32])
        return int(first), int(last)


@dataclass
class Recorded:
    """What was read.

    Attributes:
        name: The trace, for messages.
        meta: Of its lowest rank.
        forwards: (rank, step, forward) of those read, in order.
        sizes: Tokens of each, padding and all streams included.
        layers: By number.
        tokens: Columns of `tokens` as arrays (`token_id` only where kept), and `at` as in
            `LayerRows`; in no order.
        requests: The user's request ids, by (rank, sequence).
        parents: The sequence that a beam forked from, as (rank, sequence) too.
        rejected: (rank, step, forward, sequence, position) of drafts and beams that were not kept.
    """

    name: str
    meta: Meta
    forwards: list[tuple[int, int, int]]
    sizes: list[int]
    layers: dict[int, LayerRows]
    tokens: dict[str, NDArray[Any]]
    requests: dict[tuple[int, int], str] = field(default_factory=dict)
    parents: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    rejected: set[tuple[int, int, int, int, int]] = field(default_factory=set)


def read(
    path: str | Path, *, ranks: list[int] | None, steps: range | None, weights: bool
) -> Recorded:
    """Read the decisions of a trace.

    Args:
        path: Folder of the trace.
        ranks: Which; None: all but copies of others.
        steps: Only these steps.
        weights: Read the gate weights too.

    Raises:
        TraceError: Not a trace.
        SteeringError: It has no per-token rows, or not of every token.
    """
    files = open_run(path)
    chosen = files.ranks("load") if ranks is None else ranks
    if unknown := set(chosen) - set(files.metas):
        raise SteeringError(
            f"{path} has no rank {min(unknown)}; it has {', '.join(map(str, files.metas))}."
        )
    forwards: list[tuple[int, int, int]] = []
    sizes: list[int] = []
    layers: dict[int, list[LayerRows]] = {}
    tokens: list[dict[str, NDArray[Any]]] = []
    for rank in chosen:
        numbers = _forwards(files, rank, steps)
        first = len(forwards)
        forwards += [(rank, step, forward) for step, forward in numbers]
        sizes += numbers.values()
        index = {key: first + i for i, key in enumerate(numbers)}
        seen = _tokens(files, rank, steps, index)
        tokens.append(seen)
        for info in files.metas[rank].layers:
            rows = _layer(files, rank, steps, index, info, weights)
            layers.setdefault(info.layer, []).append(rows)
    found = Recorded(
        name=str(path),
        meta=files.meta,
        forwards=forwards,
        sizes=sizes,
        layers={number: _joined(parts) for number, parts in sorted(layers.items())},
        tokens={k: np.concatenate([t[k] for t in tokens]) for k in tokens[0]} if tokens else {},
    )
    for rank in chosen:
        _add_sequences(found, files, rank)
        _add_outcomes(found, files, rank)
    if found.meta.imported and not any(len(rows.ids_NK) for rows in found.layers.values()):
        raise SteeringError(f"{path} holds no per-token rows: {came_from(found.meta, 'tokens')}.")
    if not any(len(rows.ids_NK) for rows in found.layers.values()):
        where = "" if steps is None else f" of steps {steps.start} to {steps.stop - 1}"
        raise SteeringError(
            f"{path} holds no per-token rows{where} (sampling: {files.meta.sampling}). Record with "
            "record(..., tokens=1.0) what is to be replayed."
        )
    return found


def came_from(meta: Meta, what: str) -> str:
    """Where an imported trace is from, and why it lacks this, if it says so."""
    why = meta.lacks.get(what, "")
    return f"imported from {meta.imported}" + (f" ({why})" if why else "")


def _forwards(files: RunFiles, rank: int, steps: range | None) -> dict[tuple[int, int], int]:
    """Tokens of each (step, forward), in order."""
    found: dict[tuple[int, int], int] = {}
    for table in _parts(files, "steps", rank, _STEPS, steps):
        for row in table.to_pylist():
            found[row["step"], row["forward"]] = row["tokens"] + row["padding_tokens"]
    return dict(sorted(found.items()))


def _tokens(
    files: RunFiles, rank: int, steps: range | None, index: dict[tuple[int, int], int]
) -> dict[str, NDArray[Any]]:
    parts = list(_parts(files, "tokens", rank, _TOKENS, steps))
    whole = pa.concat_tables(parts) if parts else None
    if whole is None or whole.num_rows == 0:
        return {
            name: np.zeros(0, np.int64)
            for name in ("at", "rank", "sequence", "position", "padding", "token_id", "stream")
        }
    ids = whole.column("token_id")
    return {
        "at": _at(whole, index),
        "rank": np.full(whole.num_rows, rank, np.int64),
        "sequence": whole.column("sequence").to_numpy(),
        "position": whole.column("position").to_numpy().astype(np.int64),
        "padding": whole.column("padding").to_numpy(),
        "token_id": pc.fill_null(ids, -1).to_numpy().astype(np.int64),
        "stream": whole.column("stream").to_numpy(),
    }


def _layer(
    files: RunFiles,
    rank: int,
    steps: range | None,
    index: dict[tuple[int, int], int],
    info: LayerInfo,
    weights: bool,
) -> LayerRows:
    columns = [*_ROUTING, "weights"] if weights else _ROUTING
    at, ids, given = [], [], []
    for table in _parts(files, "routing", rank, columns, steps, layer=info.layer):
        chosen = table.column("expert_ids")
        if not info.faithful:  # force what the router chose, not what ran in its place
            chosen = pc.coalesce(table.column("router_ids"), chosen)
        at.append(_at(table, index))
        ids.append(_rectangle(chosen, info, np.int32, OWN))
        if weights:
            given.append(_rectangle(table.column("weights"), info, np.float32, 0))
    width = info.top_k or 0
    at_N = np.concatenate([*at, np.zeros(0, np.int64)])
    order = np.argsort(at_N, kind="stable")
    return LayerRows(
        info,
        at_N[order],
        np.concatenate(ids)[order] if ids else np.zeros((0, width), np.int32),
        np.concatenate(given)[order] if given else None,
    )


def _joined(parts: list[LayerRows]) -> LayerRows:
    """The rows of several ranks, which come one after the other."""
    if len(parts) == 1:
        return parts[0]
    with_rows = [p for p in parts if len(p.at_N)] or parts[:1]
    weights = [p.weights_NK for p in with_rows if p.weights_NK is not None]
    return LayerRows(
        with_rows[0].info,
        np.concatenate([p.at_N for p in with_rows]),
        np.concatenate([p.ids_NK for p in with_rows]),
        np.concatenate(weights) if len(weights) == len(with_rows) else None,
    )


def _add_sequences(found: Recorded, files: RunFiles, rank: int) -> None:
    for table in _parts(files, "sequences", rank, _SEQUENCES, None):
        for row in table.to_pylist():
            if row["request"] is not None:
                found.requests[rank, row["sequence"]] = row["request"]
            if row["parent"] is not None:
                found.parents[rank, row["sequence"]] = (rank, row["parent"])


def _add_outcomes(found: Recorded, files: RunFiles, rank: int) -> None:
    """Rows are in the order in which they were written: a later word overrules."""
    for table in _parts(files, "outcomes", rank, _OUTCOMES, None):
        known = pc.and_(table.column("kept").is_valid(), table.column("position").is_valid())
        for row in table.filter(known).to_pylist():
            token = (rank, row["step"], row["forward"], row["sequence"], row["position"])
            (found.rejected.discard if row["kept"] else found.rejected.add)(token)


def _parts(
    files: RunFiles,
    table: str,
    rank: int,
    columns: list[str],
    steps: range | None,
    **equal: int,
) -> Iterator[pa.Table]:
    """A table's rows that count, sealed ones first, open ones last."""
    sealed = files.segments.get(table, {}).get(rank, [])
    stream = files.streams.get(table, {}).get(rank)
    wanted = [(name, "=", value) for name, value in equal.items()]
    if steps is not None:
        wanted += [("step", ">=", steps.start), ("step", "<", steps.stop)]
    for part in [*sealed, *([] if stream is None else [stream])]:
        if isinstance(part, Path):
            there = pq.read_schema(part).names
            have = [c for c in columns if c in there]
            part = pq.read_table(part, columns=have, filters=wanted or None, partitioning=None)
        else:
            part = part.select([c for c in columns if c in part.column_names])
            if wanted:
                part = part.filter(pq.filters_to_expression(wanted))
        for missing in set(columns) - set(part.column_names):  # written before the column was
            nulls = pa.nulls(part.num_rows, pa.list_(pa.int32()))
            part = part.append_column(missing, nulls)
        yield _counting(part, files.metas[rank])


def _counting(part: pa.Table, meta: Meta) -> pa.Table:
    """Leave out rows that a later attempt overtook."""
    overtaken = superseded_from(meta)
    if not overtaken or "step" not in part.column_names:
        return part
    counts = np.ones(part.num_rows, bool)
    attempt, step = part.column("attempt").to_numpy(), part.column("step").to_numpy()
    for number, first in overtaken.items():
        counts &= ~((attempt == number) & (step >= first))
    return part.filter(pa.array(counts))


def _at(table: pa.Table, index: dict[tuple[int, int], int]) -> NDArray[np.int64]:
    """Number of the forward and token in one number that sorts as they do."""
    step, forward = table.column("step").to_numpy(), table.column("forward").to_numpy()
    both = np.stack([step, forward.astype(np.int64)], 1)
    unique, inverse = np.unique(both, axis=0, return_inverse=True)
    places = [(int(s), int(f)) for s, f in unique]
    if unknown := [place for place in places if place not in index]:
        step, forward = unknown[0]
        raise SteeringError(
            f"rows of step {step}, forward {forward} have no row in the table `steps`: the trace "
            "is still being written, or damaged."
        )
    numbers = np.array([index[place] for place in places], np.int64)
    token = table.column("token").to_numpy().astype(np.int64)
    found: NDArray[np.int64] = (numbers[inverse.reshape(-1)] << 32) | token
    return found


def _rectangle(column: pa.ChunkedArray, info: LayerInfo, dtype: Any, blank: int) -> NDArray[Any]:
    """Lists as `[N, K]`, short ones filled up with `blank`."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], pa.list_(pa.int32()))
    lengths = pc.list_value_length(whole).fill_null(0).to_numpy().astype(np.int64)
    widest = max(int(lengths.max(initial=0)), info.top_k or 0)
    values = whole.flatten().to_numpy(zero_copy_only=False)
    filled: NDArray[Any] = np.full((len(lengths), widest), blank, dtype)
    filled[np.arange(widest)[None] < lengths[:, None]] = values
    return filled
