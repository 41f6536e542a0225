"""Which forwards of a trace have per-token rows, and which have those of all their tokens.

A forward is replayed as the batch that it was, so one of which only some sequences were sampled is
not that batch: it is counted, and left out unless it is asked for.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.lacking import no_rows
from moe_lens.replay import tables
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import RunFiles

Ints = NDArray[np.int64]
KEY = ("layer", "step", "forward")


@dataclass(frozen=True)
class Index:
    """What of a trace can be replayed.

    Attributes:
        files: The snapshot that it is read from.
        infos: The layers to replay, by (rank, layer).
        sites: A row for each (rank, layer, step, forward) with per-token rows: `phase`, `rows` of
            valid tokens, and whether they are `whole`, all of the tokens that were routed.
        forwards: Forwards in the trace (within the steps and the phase asked for), of all ranks.
        padding: Rows of padding, or of tokens that were routed again, which are not replayed.
    """

    files: RunFiles
    infos: dict[tuple[int, int], LayerInfo]
    sites: pa.Table
    forwards: int
    padding: int


def index_of(
    files: RunFiles,
    *,
    layers: frozenset[int] | None = None,
    phase: str | None = None,
    steps: range | None = None,
) -> Index:
    """Look through the keys of a trace's per-token rows, one batch at a time.

    Args:
        files: A snapshot of the run.
        layers: Only these.
        phase: Only this one.
        steps: Only these.

    Raises:
        ReplayError: No such layer, a layer whose experts choose tokens, or nothing to replay.
        TraceError: A segment cannot be read.
    """
    infos = layers_of(files, layers)
    parts, forwards, padding = [], 0, 0
    for rank in tables.ranks(files):
        step_rows = _steps(files, rank, phase, steps)
        forwards += step_rows.num_rows
        mine = {layer: info for (of, layer), info in infos.items() if of == rank}
        if mine and step_rows.num_rows:
            sites, left_out = _sites(files, rank, mine, step_rows, steps)
            parts.append(sites)
            padding += left_out
    sites = pa.concat_tables(parts) if parts else pa.table({})
    if sites.num_rows == 0:
        raise ReplayError(_nothing(files, phase, steps))
    return Index(files, infos, sites, forwards, padding)


def layers_of(
    files: RunFiles, layers: frozenset[int] | None = None
) -> dict[tuple[int, int], LayerInfo]:
    """The layers, or these of them, by (rank, layer).

    Raises:
        ReplayError: No such layer, or one whose experts choose tokens.
    """
    infos = {
        (rank, info.layer): info
        for rank in tables.ranks(files)
        for info in files.metas[rank].layers
    }
    there = {layer for _, layer in infos}
    if layers is not None:
        if unknown := layers - there:
            raise ReplayError(
                f"{files.path} has no layer {min(unknown)}: its layers are {_spans(there)}."
            )
        infos = {key: info for key, info in infos.items() if key[1] in layers}
    chosen_by_experts = {k[1] for k, info in infos.items() if info.router == "expert-choice"}
    if chosen_by_experts:
        others = there - chosen_by_experts
        rest = f" --layers {_spans(others)} replays the others." if others else ""
        raise ReplayError(
            f"{files.path}: the experts of layer {_spans(chosen_by_experts)} choose their tokens "
            "(expert choice): every expert takes as many as every other, so there is no routing to "
            f"time. Replay takes layers in which tokens choose experts.{rest}"
        )
    return infos


def _nothing(files: RunFiles, phase: str | None, steps: range | None) -> str:
    there = pa.concat_tables(
        [tables.rows(files, "steps", rank, ("step", "phase"), None) for rank in tables.ranks(files)]
    )
    phases = sorted(set(there["phase"].to_pylist()))
    if phase is not None and phase not in phases:
        return f"{files.path} has no phase {phase!r}: its phases are {', '.join(phases)}."
    if steps is not None and there.num_rows:
        known = pc.min_max(there["step"]).as_py()
        if steps.stop <= known["min"] or steps.start > known["max"]:
            return (
                f"{files.path} has no steps {steps.start} to {steps.stop - 1}: its steps are "
                f"{known['min']} to {known['max']}."
            )
    where = "" if phase is None else f" of phase {phase!r}"
    where += "" if steps is None else f" of steps {steps.start} to {steps.stop - 1}"
    if files.meta.imported:
        return f"{files.path} holds {no_rows(files.meta, unowned=False)}."
    return (
        f"{files.path} holds no per-token rows{where} (sampling: {files.meta.sampling}), and "
        "counts do not say which token went where. Record what is to be replayed with "
        "moe_lens.record(model, run, tokens=1.0), or moe-lens record --tokens 1."
    )


def _steps(files: RunFiles, rank: int, phase: str | None, steps: range | None) -> pa.Table:
    only = _in(steps)
    if phase is not None:
        is_phase = pc.field("phase") == phase
        only = is_phase if only is None else only & is_phase
    names = ("step", "forward", "phase", "window", "tokens")
    return tables.rows(files, "steps", rank, names, only)


def _sites(
    files: RunFiles,
    rank: int,
    infos: dict[int, LayerInfo],
    steps: pa.Table,
    only_steps: range | None,
) -> tuple[pa.Table, int]:
    """The sites of a rank, and how many rows of padding there are."""
    pads = _Padding(files, rank, {info.stream for info in infos.values()}, only_steps)
    runs: list[tuple[Ints, ...]] = []
    left_out = 0
    only = pc.field("layer").isin(list(infos))
    if (narrowed := _in(only_steps)) is not None:
        only &= narrowed
    for batch in tables.batches(files, "routing", rank, (*KEY, "token"), only):
        layer, step, forward, token = (_ints(batch, name) for name in (*KEY, "token"))
        valid = ~pads.among(infos, layer, step, forward, token)
        left_out += int((~valid).sum())
        ones = np.ones(int(valid.sum()), np.int64)
        runs.append(_summed([key[valid] for key in (layer, step, forward)], ones))
    *keys, counted = _summed(
        [np.concatenate([r[i] for r in runs] or [np.zeros(0, np.int64)]) for i in range(len(KEY))],
        np.concatenate([r[-1] for r in runs] or [np.zeros(0, np.int64)]),
    )
    kept = pa.table([*keys, counted], names=[*KEY, "rows"])
    steps = steps.set_column(1, "forward", steps.column("forward").cast(pa.int64()))
    kept = kept.join(steps, keys=["step", "forward"], join_type="inner")
    kept = kept.join(_windows(files, rank), keys=["window", "layer"])
    sums = kept.group_by(["window", "layer"]).aggregate([("rows", "sum")])
    kept = kept.join(sums, keys=["window", "layer"])
    main = [layer for layer, info in infos.items() if info.stream == "main"]
    alone = pc.fill_null(pc.equal(kept["window_forwards"], 1), False)
    of_window = pc.fill_null(pc.equal(kept["rows_sum"], kept["window_tokens"]), False)
    of_forward = pc.and_(
        pc.equal(kept["rows"], kept["tokens"]),
        pc.is_in(kept["layer"], value_set=pa.array(main, pa.int64())),
    )
    whole = pc.or_(of_window, pc.and_(pc.invert(alone), of_forward))
    made = pa.table(
        {
            "rank": pa.repeat(pa.scalar(rank, pa.int64()), kept.num_rows),
            **{name: kept[name] for name in (*KEY, "phase", "rows")},
            "whole": whole,
        }
    )
    return made, left_out


def _windows(files: RunFiles, rank: int) -> pa.Table:
    """Tokens that each layer routed in each window, and in how many forwards."""
    names = ("window", "layer", "tokens", "forwards")
    found = tables.rows(files, "layers", rank, names)
    sums = found.group_by(["window", "layer"]).aggregate([("tokens", "sum"), ("forwards", "sum")])
    return pa.table(
        {
            "window": sums["window"],
            "layer": sums["layer"].cast(pa.int64()),
            "window_tokens": sums["tokens_sum"],
            "window_forwards": sums["forwards_sum"],
        }
    )


class _Padding:
    """Which tokens were padding, by stream. Holds those tokens: nothing where none was padded."""

    def __init__(self, files: RunFiles, rank: int, streams: set[str], steps: range | None) -> None:
        self.of: dict[str, NDArray[Any]] = {}
        for stream in streams:
            only = (pc.field("stream") == stream) & pc.field("padding")
            if (narrowed := _in(steps)) is not None:
                only &= narrowed
            found = tables.rows(files, "tokens", rank, ("step", "forward", "token"), only)
            keys = [_ints(found, name) for name in ("step", "forward", "token")]
            self.of[stream] = np.unique(_joined(*keys))

    def among(
        self, infos: dict[int, LayerInfo], layer: Ints, step: Ints, forward: Ints, token: Ints
    ) -> NDArray[np.bool_]:
        """Whether each of these rows is of padding."""
        found = np.zeros(len(layer), bool)
        for number in np.unique(layer).tolist():
            pads = self.of[infos[number].stream]
            if len(pads):
                at = layer == number
                found[at] = np.isin(_joined(step[at], forward[at], token[at]), pads)
        return found


def padding_of(
    index: Index, rank: int, stream: str, steps: list[int]
) -> dict[tuple[int, int], list[int]]:
    """The tokens that are padding in these steps, by (step, forward)."""
    only = (pc.field("stream") == stream) & pc.field("padding") & pc.field("step").isin(steps)
    names = ("step", "forward", "token")
    found = tables.rows(index.files, "tokens", rank, names, only)
    pads: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step, forward, token in zip(*(found[name].to_pylist() for name in names), strict=True):
        pads[step, forward].append(token)
    return pads


def _joined(step: Ints, forward: Ints, token: Ints) -> NDArray[Any]:
    """Three numbers as one that can be compared."""
    return np.stack([step, forward, token], axis=1).view("V24").ravel()


def _summed(keys: list[Ints], counts: Ints) -> tuple[Ints, ...]:
    """Distinct keys, sorted, and the sum of each one's counts."""
    order = np.lexsort(keys[::-1])
    keys = [k[order] for k in keys]
    first = beginnings(keys)
    total = np.add.reduceat(counts[order], first) if len(first) else counts
    return (*(k[first] for k in keys), total)


def beginnings(keys: list[Ints]) -> Ints:
    """Where in sorted rows another key begins, the first row included."""
    changes = np.zeros(len(keys[0]), bool)
    changes[:1] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changes)


def _ints(rows: pa.RecordBatch | pa.Table, name: str) -> Ints:
    column: Ints = rows.column(name).to_numpy().astype(np.int64)
    return column


def _in(steps: range | None) -> pc.Expression | None:
    if steps is None:
        return None
    return (pc.field("step") >= steps.start) & (pc.field("step") < steps.stop)


def _spans(numbers: set[int] | frozenset[int]) -> str:
    """Numbers as 0-3, 7."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
