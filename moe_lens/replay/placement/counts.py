"""How many rows each expert computed, forward by forward: what placements are fitted to.

A forward of an expert-parallel group is that of all ranks of the trace: what they did in the
forward of one number in one step is summed. Counts come from the table `load` where a window is one
forward. Forwards that share a window of counts (decoding) are counted from their rows per token, if
those are there for all tokens; otherwise they are left out, and said to be.

F forwards, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.lacking import not_there
from moe_lens.replay import tables
from moe_lens.replay.choose import Forward, evenly
from moe_lens.replay.index import Index, index_of, layers_of
from moe_lens.replay.routing import read
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import RunFiles

MOST = 2_000
"""Forwards that are looked at, evenly spread over the run, if nobody says."""

Key = tuple[int, int, str]
"""Step, forward, phase."""


@dataclass(frozen=True)
class Counts:
    """Rows by forward, layer and expert.

    Attributes:
        forwards: F of them, in their order in time.
        infos: The L layers.
        rows_FLE: Rows that the expert computed, int32.
        recorded: Forwards in the trace (of the phase and steps asked for).
        uncounted: Of those, forwards whose own counts are not known.
    """

    forwards: list[Key]
    infos: list[LayerInfo]
    rows_FLE: NDArray[np.int32]
    recorded: int
    uncounted: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(info.layer for info in self.infos)

    @property
    def experts(self) -> int:
        return int(self.rows_FLE.shape[2])

    @property
    def phases(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(phase for _, _, phase in self.forwards))

    def at(self, places: list[int]) -> Counts:
        """These forwards, by their places."""
        forwards = [self.forwards[i] for i in places]
        rows_FLE = self.rows_FLE[places]
        return Counts(forwards, self.infos, rows_FLE, self.recorded, self.uncounted)

    def of_phase(self, phase: str) -> Counts:
        """Forwards of one phase."""
        return self.at([i for i, key in enumerate(self.forwards) if key[2] == phase])

    def total_LE(self) -> NDArray[np.int64]:
        """Rows of each expert over all forwards."""
        total_LE: NDArray[np.int64] = self.rows_FLE.sum(axis=0, dtype=np.int64)
        return total_LE


def counts_of(
    files: RunFiles,
    *,
    layers: frozenset[int] | None = None,
    phase: str | None = None,
    steps: range | None = None,
    most: int | None = MOST,
) -> Counts:
    """Read them.

    Args:
        files: A snapshot of the run.
        layers: Only these; otherwise all of the main stream.
        phase: Only this one.
        steps: Only these.
        most: At most so many forwards, of each phase its share, evenly spread; None: all.

    Raises:
        ReplayError: No such layer or phase, layers that no placement serves alike, or no counts.
        TraceError: A segment cannot be read.
    """
    infos = placed_layers(files, layers)
    own, windows, shared, ran = _forwards(files, phase, steps)
    index = rows_of(files, infos, phase, steps) if shared else None
    whole = set() if index is None else _whole(index, ran) & shared
    keys = _spread(sorted(own | whole), most)
    if not keys:
        raise ReplayError(_nothing(files, len(shared), phase, steps))
    at = {key: i for i, key in enumerate(keys)}
    counted = np.zeros((len(keys), len(infos), infos[0].experts), np.int32)
    _add_windows(files, infos, windows, at, counted)
    if index is not None:
        _add_rows(index, infos, whole & set(keys), at, counted)
    uncounted = len(shared) - len(whole)
    return Counts(keys, infos, counted, len(own) + len(shared), uncounted)


def placed_layers(files: RunFiles, layers: frozenset[int] | None) -> list[LayerInfo]:
    """The layers that are placed, which have equally many experts.

    Raises:
        ReplayError: No such layer, expert choice, or numbers of experts that differ.
    """
    by_layer = {layer: info for (_, layer), info in layers_of(files, layers).items()}
    infos = [by_layer[n] for n in sorted(by_layer)]
    if layers is None:
        infos = [info for info in infos if info.stream == "main"] or infos
    if not infos:
        raise ReplayError(f"{files.path} has no MoE layers.")
    sizes: dict[int, list[int]] = {}
    for info in infos:
        sizes.setdefault(info.experts, []).append(info.layer)
    if len(sizes) > 1:
        said = "; ".join(f"{e} experts: layers {_list(of)}" for e, of in sizes.items())
        raise ReplayError(
            f"{files.path}: layers differ in their number of experts ({said}). Place those of one "
            "number at a time, with --layers."
        )
    return infos


def _list(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:6])) + (", …" if len(layers) > 6 else "")


Windows = dict[int, dict[int, Key]]
"""By rank: the forward that is all of a window."""

Ran = dict[Key, set[int]]
"""By forward: the ranks that had tokens in it."""


def _forwards(
    files: RunFiles, phase: str | None, steps: range | None
) -> tuple[set[Key], Windows, set[Key], Ran]:
    """Forwards that have counts of their own, their windows, those that share one, and their ranks.

    A forward that shares one on any rank counts as shared.
    """
    windows: Windows = {}
    own: set[Key] = set()
    shared: set[Key] = set()
    ran: Ran = {}
    for rank in tables.ranks(files):
        names = ("step", "forward", "phase", "window", "tokens")
        found = tables.rows(files, "steps", rank, names, _only(phase, steps))
        in_window: dict[int, list[Key]] = {}
        columns = (found[name].to_pylist() for name in names)
        for step, forward, of_phase, window, tokens in zip(*columns, strict=True):
            in_window.setdefault(window, []).append((step, forward, of_phase))
            if tokens:
                ran.setdefault((step, forward, of_phase), set()).add(rank)
        # A window whose other forwards the filter left out is shared all the same.
        several = _several(files, rank)
        windows[rank] = {}
        for window, keys in in_window.items():
            if len(keys) == 1 and window not in several:
                windows[rank][window] = keys[0]
                own.add(keys[0])
            else:
                shared.update(keys)
    for of_rank in windows.values():
        for window in [w for w, key in of_rank.items() if key in shared]:
            del of_rank[window]
    return own - shared, windows, shared, ran


def _several(files: RunFiles, rank: int) -> set[int]:
    """Windows of more than one forward."""
    found = tables.rows(files, "layers", rank, ("window",), pc.field("forwards") > 1)
    return set(found["window"].unique().to_pylist())


def _only(phase: str | None, steps: range | None) -> pc.Expression | None:
    only = None if phase is None else pc.field("phase") == phase
    if steps is not None:
        of_steps = (pc.field("step") >= steps.start) & (pc.field("step") < steps.stop)
        only = of_steps if only is None else only & of_steps
    return only


def rows_of(
    files: RunFiles,
    infos: list[LayerInfo],
    phase: str | None = None,
    steps: range | None = None,
) -> Index | None:
    """What rows per token the run has of these layers; None: none.

    Raises:
        TraceError: A segment cannot be read.
    """
    layers = frozenset(info.layer for info in infos)
    try:
        return index_of(files, layers=layers, phase=phase, steps=steps)
    except ReplayError:  # nothing to replay: the counts may do without
        return None


def _whole(index: Index, ran: Ran) -> set[Key]:
    """Forwards of which every layer and every rank has the rows of all tokens."""
    names = ("step", "forward", "phase", "whole_all", "rank_count_distinct")
    sums = [("whole", "all"), ("rank", "count_distinct")]
    found = index.sites.group_by(names[:3]).aggregate(sums)
    holders = {rank for rank, _ in index.infos}  # the others have none of these layers
    kept = set()
    for *key, whole, ranks in zip(*(found[name].to_pylist() for name in names), strict=True):
        step, forward, phase = key
        if whole and ranks >= len(ran.get((step, forward, phase), set()) & holders):
            kept.add((step, forward, phase))
    return kept


def _add_rows(
    index: Index,
    infos: list[LayerInfo],
    keys: set[Key],
    at: dict[Key, int],
    counted: NDArray[np.int32],
) -> None:
    """Add what the rows per token of these forwards say."""
    layer_at = {info.layer: i for i, info in enumerate(infos)}
    forwards = rank_forwards(index, keys)
    for forward, found in zip(forwards, read(index, list(layer_at), forwards), strict=True):
        for routed in found:
            kept = routed.expert_ids_TK[(routed.expert_ids_TK >= 0) & ~routed.dropped_TK]
            rows_E = np.bincount(kept, minlength=counted.shape[2]).astype(np.int32)
            counted[at[forward.step, forward.forward, forward.phase], layer_at[routed.layer]] += (
                rows_E
            )


def rank_forwards(index: Index, keys: set[Key]) -> list[Forward]:
    """These forwards, of each rank that ran them."""
    names = ("rank", "step", "forward", "phase")
    grouped = index.sites.group_by(names).aggregate([("rows", "max")])
    order = [(name, "ascending") for name in ("rank", "step", "forward")]
    return [
        Forward(row["rank"], row["step"], row["forward"], row["phase"], row["rows_max"])
        for row in grouped.sort_by(order).to_pylist()
        if (row["step"], row["forward"], row["phase"]) in keys
    ]


def _spread(keys: list[Key], most: int | None) -> list[Key]:
    """At most so many, of each phase its share (and one), evenly apart, in their order.

    Phases take turns in a run: every fourth forward of it may be of one phase.
    """
    if most is None or len(keys) <= most:
        return keys
    kept: list[Key] = []
    for phase in {key[2] for key in keys}:
        of = [key for key in keys if key[2] == phase]
        n = max(1, most * len(of) // len(keys))
        kept += [of[i] for i in evenly(len(of), n)]
    return sorted(kept)


def _add_windows(
    files: RunFiles,
    infos: list[LayerInfo],
    windows: Windows,
    at: dict[Key, int],
    counted: NDArray[np.int32],
) -> None:
    """Add what windows of one forward counted."""
    experts = counted.shape[2]
    layer_at = np.full(max(info.layer for info in infos) + 1, -1)
    layer_at[[info.layer for info in infos]] = np.arange(len(infos))
    names = ("window", "layer", "expert", "processed", "rerouted_in")
    flat = counted.reshape(-1)
    for rank, of_rank in windows.items():
        wanted = {window: at[key] for window, key in of_rank.items() if key in at}
        if not wanted:
            continue
        numbers = np.array(sorted(wanted))
        forward_W = np.array([wanted[n] for n in numbers.tolist()])
        only = pc.field("layer").isin([info.layer for info in infos])
        only &= (pc.field("window") >= numbers[0]) & (pc.field("window") <= numbers[-1])
        for batch in tables.batches(files, "load", rank, names, only):
            window, layer, expert, rows, moved = (_ints(batch, name) for name in names)
            w = np.searchsorted(numbers, window).clip(max=len(numbers) - 1)
            kept = (numbers[w] == window) & (expert < experts)
            place = (forward_W[w] * len(infos) + layer_at[layer]) * experts + expert
            # Several tags of one window count into one place.
            np.add.at(flat, place[kept], (rows + moved)[kept].astype(np.int32))


def _ints(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    column: NDArray[np.int64] = batch.column(name).to_numpy(zero_copy_only=False).astype(np.int64)
    return column


def _phases(files: RunFiles) -> list[str]:
    found: set[str] = set()
    for rank in tables.ranks(files):
        found.update(tables.rows(files, "steps", rank, ("phase",))["phase"].unique().to_pylist())
    return sorted(found)


def _nothing(files: RunFiles, recorded: int, phase: str | None, steps: range | None) -> str:
    if not recorded:
        where = "" if phase is None else f" of phase {phase!r}"
        where += "" if steps is None else f" of steps {steps.start} to {steps.stop - 1}"
        there = ", ".join(_phases(files))
        return f"{files.path} has no forwards{where}; its phases are {there}."
    how = "record with tokens=1.0 (moe-lens record --tokens 1)"
    return (
        f"{files.path}: all {recorded:,} forwards share their counts with others (small ones do, "
        "as in decoding), and there are no rows per token to tell them apart. A placement is "
        f"judged forward by forward: {not_there(files.meta, 'tokens', otherwise=how)}."
    )
