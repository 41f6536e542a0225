"""The experts of each token of whole sequences, in order of position: what routing replay needs.

A sequence is whole if every position from 0 to its last was kept once, every layer has its row, and
an expert computed each choice. Others are left out, and named with the reason. Positions that were
rejected (drafts, beams) are no part of it. One that still ran when the trace ended, or that the
steps or phase asked for cut off, is whole as far as it goes.

N tokens of a rank, L layers, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moe_lens.errors import ExportRefused
from moe_lens.exporters.selection import Selection, layers_of
from moe_lens.replay import tables
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import RunFiles

Ints = NDArray[np.int64]

NOT_FROM_0 = "do not begin at position 0 (a cached prefix, a branch of a beam, or not recorded)"
HOLES = "have holes between their positions"
TWICE = "have a position that was routed and kept more than once"
DROPPED = "have a choice that no expert computed"
LAYERS = "have a token that some layer has no row of"


@dataclass(frozen=True)
class Whole:
    """One sequence.

    Attributes:
        rank, number: Which.
        request, tag: None, "": not known.
        prompt_tokens: Of phase prefill, where the rest is of phase decode; None: not known.
        ids_TLK: The narrowest of uint8, uint16, int32 that holds every expert.
    """

    rank: int
    number: int
    request: str | None
    tag: str
    prompt_tokens: int | None
    ids_TLK: NDArray[Any]

    @property
    def name(self) -> str:
        """Of the request, or else by its number."""
        return self.request if self.request is not None else f"{self.rank}-{self.number}"


@dataclass
class Sequences:
    """The sequences of a run.

    Attributes:
        infos: The layers, of one stream.
        top_k: K.
        dtype: Of ids.
        left_out: Names by the reason why they are left out; complete after `read`.
    """

    files: RunFiles
    selection: Selection
    infos: list[LayerInfo]
    top_k: int
    dtype: Any
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def read(self, scratch: Path) -> Iterator[Whole]:
        """Every whole one, by rank and number.

        Args:
            scratch: An empty folder: the ids of a rank lie there, not in memory, until they are
                in the order of sequences.

        Raises:
            ExportRefused: None is whole, or a layer has another number of choices than it says.
            TraceError: A segment cannot be read.
        """
        found = 0
        for rank in tables.ranks(self.files):
            for each in self._of_rank(rank, scratch):
                found += 1
                yield each
        if not found:
            why = "; ".join(f"{len(x):,} {reason}" for reason, x in self.left_out.items())
            raise ExportRefused(
                f"{self.files.path} has no whole sequence{self.selection.said(self.files)}"
                + (f": {why}." if why else " (sampling: " + self.files.meta.sampling + ").")
            )

    def _of_rank(self, rank: int, scratch: Path) -> Iterator[Whole]:
        said = _named(self.files, rank)
        tokens = _tokens(self.files, rank, self.infos[0].stream, self.selection, said)
        bounds = np.append(_beginnings(tokens.sequence_N), len(tokens.sequence_N))
        bad: dict[int, str] = {}
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if reason := _broken(tokens.position_N[begin:end]):
                bad[begin] = reason
        N, L = len(tokens.sequence_N), len(self.infos)
        if not N:
            return
        path = scratch / f"{rank}.npy"
        ids_NLK = np.lib.format.open_memmap(path, "w+", dtype=self.dtype, shape=(N, L, self.top_k))
        rows_N, dropped_N = self._fill(rank, tokens, ids_NLK)
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            number = int(tokens.sequence_N[begin])
            request, tag = said.get(number, (None, ""))
            reason = bad.get(begin)
            if reason is None and dropped_N[begin:end].any():
                reason = DROPPED
            if reason is None and (rows_N[begin:end] != L).any():
                reason = LAYERS
            prompt = _prompt(tokens.phase_N[begin:end], tokens.phases)
            whole = Whole(rank, number, request, tag, prompt, ids_NLK[begin:end])
            if reason is None:
                yield whole
            else:
                self.left_out.setdefault(reason, []).append(whole.name)
        del ids_NLK
        path.unlink()

    def _fill(self, rank: int, tokens: _Tokens, ids_NLK: Any) -> tuple[Ints, NDArray[np.bool_]]:
        """Lay every row of routing into its place; how many each token has, and which dropped."""
        layers = [info.layer for info in self.infos]
        at_layer = np.full(max(layers) + 1, -1)
        at_layer[layers] = np.arange(len(layers))
        names = ("step", "forward", "layer", "token", "expert_ids", "dropped")
        only = pc.field("layer").isin(layers)
        if (steps := self.selection.steps) is not None:
            only &= (pc.field("step") >= steps.start) & (pc.field("step") < steps.stop)
        N = len(ids_NLK)
        rows_N, dropped_N = np.zeros(N, np.int64), np.zeros(N, bool)
        for batch in tables.batches(self.files, "routing", rank, names, only):
            at_B = tokens.places(*(_ints(batch, name) for name in ("step", "forward", "token")))
            mine = at_B >= 0
            if not mine.any():
                continue
            layer_B = at_layer[_ints(batch, "layer")[mine]]
            lists = batch.column("expert_ids").filter(pa.array(mine))
            lengths = pc.list_value_length(lists).to_numpy()
            if (lengths != self.top_k).any():
                i = int(np.argmax(lengths != self.top_k))
                raise ExportRefused(
                    f"{self.files.path}: a token of layer {layers[layer_B[i]]} has {lengths[i]} "
                    f"choices, but the layer is one of top-{self.top_k}."
                )
            ids = lists.flatten().to_numpy().reshape(-1, self.top_k)
            ids_NLK[at_B[mine], layer_B] = ids
            rows_N += np.bincount(at_B[mine], minlength=N)
            lost = batch.column("dropped").is_valid().to_numpy(zero_copy_only=False)[mine]
            dropped_N[at_B[mine][lost]] = True
        return rows_N, dropped_N


def sequences_of(files: RunFiles, selection: Selection) -> Sequences:
    """What sequences there are to read.

    Raises:
        ExportRefused: Rows were lost, ranks have other layers, or layers have no one number of
            choices.
    """
    infos = layers_of(files, selection)
    for rank in tables.ranks(files):
        there = {info.layer for info in files.metas[rank].layers}
        if missing := {info.layer for info in infos} - there:
            raise ExportRefused(
                f"{files.path}: rank {rank} has no layer {min(missing)} (pipeline stages?): no "
                "rank knows all of a token's choices."
            )
    streams = sorted({info.stream for info in infos})
    if len(streams) > 1:
        raise ExportRefused(
            f"{files.path}: layers are of several streams ({', '.join(streams)}), which number "
            "their tokens apart: export those of one at a time, with --layers."
        )
    top_k = {info.top_k for info in infos}
    if len(top_k) > 1 or None in top_k:
        words = "a dynamic number" if None in top_k else f"{sorted(x for x in top_k if x)}"
        raise ExportRefused(
            f"{files.path}: layers have {words} of choices a token, and an array has one width: "
            "export layers of one number at a time, with --layers."
        )
    lost = sum(
        pc.sum(
            tables.rows(files, "steps", rank, ("lost_rows",), selection.rows())["lost_rows"]
        ).as_py()
        or 0
        for rank in tables.ranks(files)
    )
    if lost:
        raise ExportRefused(
            f"{files.path}: {lost:,} rows of tokens were lost while it was recorded, and which "
            "sequences end too early is not known. Choose steps without, with --steps."
        )
    k = next(x for x in top_k if x is not None)
    most = max(info.experts + info.zero_experts for info in infos) - 1
    # As vLLM narrows ids (fused_moe/routed_experts_capturer.py of 0.33).
    dtype = np.uint8 if most <= 255 else np.uint16 if most <= 65535 else np.int32
    return Sequences(files, selection, infos, k, dtype)


# -- whose tokens ----------------------------------------------------------------------------------


@dataclass
class _Tokens:
    """Tokens of a rank, by sequence and position.

    Attributes:
        phase_N: Index into `phases`.
        forward_F: The forwards' keys, sorted.
        key_N, order_N: Keys of tokens, sorted, and the places of these tokens.
    """

    sequence_N: Ints
    position_N: Ints
    phase_N: Ints
    phases: list[str]
    forward_F: Ints
    forwards: int
    tokens: int
    key_N: Ints
    order_N: Ints

    def places(self, step: Ints, forward: Ints, token: Ints) -> Ints:
        """Where these rows belong; -1: nowhere."""
        if not len(self.key_N):
            return np.full(len(step), -1)
        of = step * self.forwards + forward
        f = np.searchsorted(self.forward_F, of).clip(max=len(self.forward_F) - 1)
        key = f * self.tokens + token
        i = np.searchsorted(self.key_N, key).clip(max=len(self.key_N) - 1)
        right = (self.forward_F[f] == of) & (self.key_N[i] == key) & (token < self.tokens)
        return np.where(right & (forward < self.forwards), self.order_N[i], -1)


def _tokens(
    files: RunFiles,
    rank: int,
    stream: str,
    selection: Selection,
    said: dict[int, tuple[str | None, str]],
) -> _Tokens:
    names = ("step", "forward", "token", "sequence", "position")
    only = (pc.field("stream") == stream) & ~pc.field("padding")
    if (steps := selection.steps) is not None:
        only &= (pc.field("step") >= steps.start) & (pc.field("step") < steps.stop)
    found = tables.rows(files, "tokens", rank, names, only)
    step, forward, token, sequence, position = (_ints(found, name) for name in names)
    ran = tables.rows(files, "steps", rank, ("step", "forward", "phase"), selection.rows())
    forwards = int(max(forward.max(initial=0), _ints(ran, "forward").max(initial=0))) + 1
    ran_key = _ints(ran, "step") * forwards + _ints(ran, "forward")
    order = np.argsort(ran_key)
    ran_key = ran_key[order]
    encoded = ran["phase"].combine_chunks().dictionary_encode()
    phase_F = _ints_of(encoded.indices)[order]
    own_key = step * forwards + forward
    at = np.searchsorted(ran_key, own_key).clip(max=max(len(ran_key) - 1, 0))
    kept = ran_key[at] == own_key if len(ran_key) else np.zeros(len(step), bool)
    kept &= ~_rejected(files, rank, step, forward, sequence, position)
    if selection.tag is not None:
        of_tag = [number for number, (_, tag) in said.items() if tag == selection.tag]
        kept &= np.isin(sequence, of_tag)
    place = np.flatnonzero(kept)
    place = place[np.lexsort((position[place], sequence[place]))]
    most = int(token.max(initial=0)) + 1
    key = at[place] * most + token[place]
    by_key = np.argsort(key)
    return _Tokens(
        sequence_N=sequence[place],
        position_N=position[place],
        phase_N=phase_F[at[place]],
        phases=encoded.dictionary.to_pylist(),
        forward_F=ran_key,
        forwards=forwards,
        tokens=most,
        key_N=key[by_key],
        order_N=by_key,
    )


def _rejected(
    files: RunFiles, rank: int, step: Ints, forward: Ints, sequence: Ints, position: Ints
) -> NDArray[np.bool_]:
    """Which of these tokens were not kept: alone, or with their whole sequence."""
    names = ("step", "forward", "sequence", "position")
    lost = tables.rows(files, "outcomes", rank, names, pc.field("kept") == pc.scalar(False))
    out = np.zeros(len(step), bool)
    if not lost.num_rows:
        return out
    alone = lost.filter(pc.is_valid(lost["position"]))
    whole = lost.filter(pc.is_null(lost["position"]))
    out |= np.isin(sequence, _ints(whole, "sequence"))
    keys = np.stack([step, forward, sequence, position], axis=1).view("V32").ravel()
    gone = np.stack([_ints(alone, name) for name in names], axis=1).view("V32").ravel()
    return out | np.isin(keys, gone)


def _named(files: RunFiles, rank: int) -> dict[int, tuple[str | None, str]]:
    """Request id and tag of each sequence."""
    found = tables.rows(files, "sequences", rank, ("sequence", "request", "tag"))
    return {r["sequence"]: (r["request"], r["tag"]) for r in found.to_pylist()}


def _broken(position: Ints) -> str | None:
    """What is wrong with the sorted positions of a sequence."""
    if (position[1:] == position[:-1]).any():
        return TWICE
    if position[0] != 0:
        return NOT_FROM_0
    return HOLES if position[-1] != len(position) - 1 else None


def _prompt(phase: Ints, phases: list[str]) -> int | None:
    names = {phases[i] for i in np.unique(phase).tolist()}
    if not names <= {"prefill", "decode"}:
        return None
    decoded = phase == (phases.index("decode") if "decode" in phases else -1)
    prompt = int((~decoded).sum())
    return None if decoded[:prompt].any() else prompt


def _beginnings(sequence: Ints) -> Ints:
    changes = np.ones(len(sequence), bool)
    changes[1:] = sequence[1:] != sequence[:-1]
    return np.flatnonzero(changes)


def _ints(rows: pa.RecordBatch | pa.Table, name: str) -> Ints:
    return _ints_of(rows.column(name))


def _ints_of(column: Any) -> Ints:
    made: Ints = (
        column.to_numpy(zero_copy_only=False).astype(np.int64)
        if isinstance(column, pa.Array)
        else column.to_numpy().astype(np.int64)
    )
    return made
