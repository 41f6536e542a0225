"""Per-token rows and one row per forward, as tables of the format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moe_lens.trace.events import Forward, LayerCounts, LayerRows, Losses, Outcomes
from moe_lens.trace.gather import lists
from moe_lens.trace.rounding import BF16_BITS, keep_mantissa
from moe_lens.trace.schema import TABLES, Table
from moe_lens.trace.tables import as_table

Step = tuple[Forward, int, int]
"""A forward, the number of its window, and how many invariants failed in it."""


def step_rows(steps: list[Step], attempt: int) -> pa.Table:
    """The rows of `steps`, one for each forward."""
    names = ("step", "forward", "phase", "t_start_ns", "host_ns", "device_ns", "padding_tokens")
    more = ("sampled", "lost_rows", "fires_expected", "fires_seen")
    columns = {n: [getattr(f, n) for f, _, _ in steps] for n in (*names, *more)}
    own = {
        "attempt": [attempt] * len(steps),
        "window": [window for _, window, _ in steps],
        "tokens": [int(f.tokens_G.sum()) for f, _, _ in steps],
        "breaches": [breaches for _, _, breaches in steps],
    }
    return as_table("steps", columns | own)


def routing_tables(forward: Forward, attempt: int, *, exact: bool) -> list[pa.Table]:
    """The rows of `routing`, layer by layer: one table for each run of layers of one shape."""
    groups: list[list[LayerCounts]] = []
    for x in sorted(forward.layers, key=lambda x: x.layer):
        if x.rows is None or len(x.rows) == 0:
            continue
        if not groups or _shape(groups[-1][-1].rows) != _shape(x.rows):
            groups.append([])
        groups[-1].append(x)
    return [_routing(forward, attempt, group, exact=exact) for group in groups]


def _shape(rows: LayerRows | None) -> tuple[Any, ...]:
    """What must agree for the rows of two layers to stand in one array."""
    assert rows is not None
    parts = (
        rows.weights_NK,
        rows.next_ids_NM,
        rows.next_weights_NM,
        rows.entropy_N,
        rows.group_entropy_N,
        rows.margin_N,
    )
    more = (rows.dropped_NK, rows.chosen_NK, rows.router_ids_NK)
    present = tuple(p is None for p in (*parts, *more))
    runners = None if rows.next_ids_NM is None else rows.next_ids_NM.shape[1]
    return rows.expert_ids_NK.shape[1], runners, present


def _routing(forward: Forward, attempt: int, group: list[LayerCounts], *, exact: bool) -> pa.Table:
    layers, rows = [x.layer for x in group], [len(x.rows or ()) for x in group]
    n = sum(rows)

    def gather(name: str, bits: int | None = None) -> NDArray[Any] | None:
        """The rows of all layers in one array; floats with `bits` of their mantissa."""
        parts = [getattr(x.rows, name) for x in group]
        if parts[0] is None:
            return None
        if bits is None or parts[0].ndim == 1 or parts[0].shape[1] == 1:
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            return whole if bits is None else keep_mantissa(whole, bits)
        whole = np.empty((n, *parts[0].shape[1:]), np.float32)
        for part, end in zip(parts, np.cumsum(rows), strict=True):
            # wide rows one layer at a time, which stays in the processor's cache
            keep_mantissa(part, bits, out=whole[end - len(part) : end])
        return whole

    bits = None if exact else BF16_BITS
    weights = gather("weights_NK", bits)
    next_ids, next_weights = gather("next_ids_NM"), gather("next_weights_NM", bits)
    entropy, margin = gather("entropy_N", BF16_BITS), gather("margin_N", BF16_BITS)
    group_entropy = gather("group_entropy_N", BF16_BITS)
    dropped, chosen = gather("dropped_NK"), gather("chosen_NK")
    router_ids = gather("router_ids_NK")
    no_lists = pa.nulls(n, pa.list_(pa.int32()))
    return as_table(
        "routing",
        _keys(forward, attempt, n, gather("forward_N"))
        | {
            "layer": np.repeat(np.array(layers, np.int32), rows),
            "token": gather("token_N"),
            "expert_ids": _choices(_not_none(gather("expert_ids_NK")), chosen),
            "weights": pa.nulls(n, pa.list_(pa.float32()))
            if weights is None
            else _choices(weights, chosen),
            "next_ids": no_lists if next_ids is None else _runners(next_ids, next_ids),
            "next_weights": pa.nulls(n, pa.list_(pa.float32()))
            if next_weights is None or next_ids is None
            else _runners(next_weights, next_ids, next_weights),
            "entropy": _optional(entropy, n),
            "margin": _optional(margin, n),
            "dropped": no_lists if dropped is None else _slots(dropped, chosen),
            "router_ids": no_lists if router_ids is None else _choices(router_ids, chosen),
            "group_entropy": _optional(group_entropy, n),
        },
    )


def logit_tables(forward: Forward, attempt: int) -> list[pa.Table]:
    """The rows of `logits`, a table per layer."""
    out = []
    for x in sorted(forward.layers, key=lambda x: x.layer):
        if x.rows is None or x.rows.logits_NE is None or len(x.rows) == 0:
            continue
        n = len(x.rows)
        columns = {
            "layer": np.full(n, x.layer, np.int32),
            "token": x.rows.token_N,
            "logits": lists(keep_mantissa(x.rows.logits_NE, BF16_BITS)),
        }
        out.append(as_table("logits", _keys(forward, attempt, n, x.rows.forward_N) | columns))
    return out


def token_tables(forward: Forward, attempt: int) -> list[pa.Table]:
    """The rows of `tokens`, a table per stream."""
    out = []
    for x in forward.tokens:
        n = len(x.token_N)
        columns = {
            "stream": pa.repeat(pa.scalar(x.stream, pa.string()), n),
            "token": x.token_N,
            "sequence": x.sequence_N,
            "position": x.position_N,
            "padding": x.padding_N,
            "tag": pa.array(forward.tags, pa.string()).take(pa.array(x.tag_N)),
            "token_id": pa.nulls(n, pa.int32()) if x.token_id_N is None else x.token_id_N,
        }
        out.append(as_table("tokens", _keys(forward, attempt, n, x.forward_N) | columns))
    return out


def sequence_table(forward: Forward, attempt: int, table: Table) -> pa.Table:
    """The rows of `sequences`, with the user's key columns."""
    parts = forward.parts or [forward]
    rows = [r for f in parts for r in f.sequences]
    columns: dict[str, Any] = {
        "attempt": [attempt] * len(rows),
        "step": [f.step for f in parts for _ in f.sequences],
        "forward": [f.forward for f in parts for _ in f.sequences],
        "sequence": [r.sequence for r in rows],
        "tag": [r.tag for r in rows],
        "request": [r.request for r in rows],
        "parent": [r.parent for r in rows],
    }
    for name in table.schema.names[len(TABLES["sequences"].columns) :]:
        columns[name] = [r.keys.get(name) for r in rows]
    arrays = [pa.array(columns[f.name], f.type) for f in table.schema]
    return pa.Table.from_arrays(arrays, schema=table.schema)


def loss_table(losses: Losses, attempt: int) -> pa.Table:
    """The rows of `outcomes` that losses make."""
    n = len(losses.sequence_N)
    position = losses.position_N
    columns = {
        "attempt": np.full(n, attempt, np.int32),
        "step": np.full(n, losses.step, np.int64),
        "forward": np.full(n, losses.forward, np.int32),
        "sequence": losses.sequence_N,
        "position": pa.nulls(n, pa.int32()) if position is None else position,
        "kept": pa.nulls(n, pa.bool_()),
        "loss": losses.loss_N,
    }
    return as_table("outcomes", columns)


def outcome_table(outcomes: Outcomes, attempt: int) -> pa.Table:
    """The rows of `outcomes` that say which tokens were kept."""
    n = len(outcomes.sequence_N)
    columns = {
        "attempt": np.full(n, attempt, np.int32),
        "step": outcomes.step_N,
        "forward": outcomes.forward_N,
        "sequence": outcomes.sequence_N,
        "position": outcomes.position_N,
        "kept": np.full(n, outcomes.kept),
        "loss": pa.nulls(n, pa.float32()),
    }
    return as_table("outcomes", columns)


def _keys(forward: Forward, attempt: int, n: int, forward_N: NDArray[Any] | None) -> dict[str, Any]:
    """Of `n` rows; `forward_N` says of which of the forward's parts each is."""
    if forward_N is None:
        step_N = np.full(n, forward.step, np.int64)
        number_N = np.full(n, forward.forward, np.int32)
    else:
        step_N = np.array([f.step for f in forward.parts], np.int64)[forward_N]
        number_N = np.array([f.forward for f in forward.parts], np.int32)[forward_N]
    return {"attempt": np.full(n, attempt, np.int32), "step": step_N, "forward": number_N}


def _optional(x_N: NDArray[Any] | None, n: int) -> pa.Array:
    if x_N is None:
        return pa.nulls(n, pa.float32())
    return pa.array(x_N, from_pandas=bool(np.isnan(x_N).any()))  # NaN: null; looking is cheaper


def _runners(
    values_NM: NDArray[Any], ids_NM: NDArray[Any], like_NM: NDArray[Any] | None = None
) -> pa.ListArray:
    """Lists of runners-up; null where there is none (id below 0, or a weight that is NaN)."""
    # Looking at all values at once is cheaper than at each row, and mostly finds nothing.
    if ids_NM.min(initial=0) >= 0 and (like_NM is None or not np.isnan(like_NM).any()):
        return lists(values_NM)
    absent_N = np.asarray((ids_NM < 0).any(1))
    if like_NM is not None:
        absent_N |= np.isnan(like_NM).any(1)
    here = values_NM[~absent_N]
    k = values_NM.shape[1]
    return _ragged(np.where(absent_N, 0, k), here.ravel(), absent_N)


def _choices(values_NK: NDArray[Any], chosen_NK: NDArray[np.bool_] | None) -> pa.ListArray:
    """Lists of the slots that hold a choice, which may be none."""
    if chosen_NK is None:
        return lists(values_NK)
    return _ragged(chosen_NK.sum(1), values_NK[chosen_NK], np.zeros(len(values_NK), bool))


def _slots(mask_NK: NDArray[np.bool_], chosen_NK: NDArray[np.bool_] | None) -> pa.ListArray:
    """Lists of the slots that are set; null where none is."""
    at_n, slots = np.nonzero(mask_NK)
    if chosen_NK is not None:  # slots are numbered among those that hold a choice
        slots = (chosen_NK.cumsum(1) - 1)[at_n, slots]
    counts = np.bincount(at_n, minlength=len(mask_NK))
    return _ragged(counts, slots.astype(np.int32), counts == 0)


def _ragged(
    lengths_N: NDArray[Any], values: NDArray[Any], null_N: NDArray[np.bool_]
) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(null_N))


def _not_none(x: NDArray[Any] | None) -> NDArray[Any]:
    assert x is not None
    return x
