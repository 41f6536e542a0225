"""Passes of another recorder, checked, into a rank of a trace.

T tokens of a pass, K choices, V outputs of a router (experts, and those that compute nothing).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.checks import AlwaysFirst
from moe_lens.importers.laying import (
    beside,
    counted_layers,
    forward_of,
    forward_of_passes,
    has_outputs,
    layer_counts,
)
from moe_lens.importers.source import Choices, Counted, Pass, Tokens
from moe_lens.trace.events import Forward, SequenceRow
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens.trace.schema import MAX_TAGS, OTHER, UNTAGGED
from moe_lens.trace.windows import SHARED_FORWARDS, fills
from moe_lens.trace.writer import TraceWriter

WAITING_BYTES = 64 << 20
"""Per-token rows handed to the writer before it is waited for: none are given up."""

MANY_TAGS = (
    f"more than {MAX_TAGS} tags: further ones are counted as '{OTHER}'; all of them are in the "
    "column `tag` of `sequences`"
)


@dataclass(slots=True)
class _Taken:
    """A pass that was looked at.

    Attributes:
        rows: Its tokens, padding included.
        tokens, token_layers: Valid ones (of the layer that has most); their sum over layers.
        kind: Passes of one kind are laid side by side; None: it stands alone.
        tokens_L: Of `Counted`: tokens of each layer.
        count_X: Of `Counted`: choices of each expert, all layers in a row.
    """

    item: Pass | Counted
    rows: int
    tokens: int
    token_layers: int
    kind: tuple[Any, ...] | None
    tokens_L: list[int] = field(default_factory=list)
    count_X: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class RankWriter:
    """Checks the passes of one rank and writes them. Not thread-safe.

    Args:
        run: Folder of the trace.
        meta: Of the rank; its layers say what passes must have.
        path: What is read, for errors.
        tag: Of tokens that have none.

    Raises:
        TraceLocked: A living process writes this rank.
        OSError: The disk refuses.
    """

    def __init__(self, run: Path, meta: Meta, path: str, *, tag: str = UNTAGGED) -> None:
        self.meta = meta
        self.passes = self.tokens = self.token_layers = 0
        self.rows = False
        """Some pass had its tokens one by one."""
        self._path = path
        self._untagged = tag
        self._layers = {info.layer: info for info in meta.layers}
        self._routers = {(x.experts + x.zero_experts, x.top_k) for x in meta.layers}
        self._ran: set[int] | None = None
        self._last = (-1, -1)
        self._tags: list[str] = list(meta.tags)
        self._begun = _Begun()
        self._always = AlwaysFirst()
        self._weighted = False
        self._handed = 0
        self._waiting: list[_Taken] = []
        """Small passes of one kind, not handed over yet."""
        self._lock = RankLock(run, meta.rank)
        try:
            self._writer = TraceWriter(run, meta, queue_bytes=1 << 62)
        except BaseException:
            self._lock.release()
            raise

    def put(self, item: Pass | Counted) -> None:
        """Take the next pass; a small one waits for others, with which it is written.

        Raises:
            ImportRefused: It, or one that waited, is no pass of these layers; says where.
            TraceWriteError: The disk refuses.
        """
        self._in_order(item)
        if not self._ran:
            return
        where = self._where(item)
        taken = self._counted(item, where) if isinstance(item, Counted) else self._pass(item, where)
        if not taken.rows:
            return
        self.passes += 1
        self.tokens += taken.tokens
        self.token_layers += taken.token_layers
        self.rows |= isinstance(item, Pass)
        if self._waiting and taken.kind != self._waiting[0].kind:
            self._lay()
        self._waiting.append(taken)
        if taken.kind is None or len(self._waiting) == SHARED_FORWARDS:
            self._lay()

    def edit(self, change: Callable[[Meta], object]) -> None:
        """Change the meta file; passes that wait are written later. Any thread may call it."""
        self._writer.edit(change)

    def flush(self) -> None:
        """Return when all before would survive `kill -9`.

        Raises:
            ImportRefused: One that waited is no pass of these layers.
            TraceWriteError: The disk refuses.
        """
        self._lay()
        self._flush()

    def close(self, error: BaseException | None = None) -> None:
        """Seal what was taken.

        Args:
            error: What ended it early.

        Raises:
            ImportRefused: What was read was never filled, or breaks an invariant.
            TraceWriteError: The disk refuses.
        """
        refused: ImportRefused | None = None
        try:
            try:
                self._lay()
            except ImportRefused as e:
                refused = e
            end = error or refused

            def ended(meta: Meta) -> None:
                meta.tags = list(self._tags)
                meta.weights = meta.weights if self._weighted else "none"
                meta.attempts[-1].ended_ns = time.time_ns()
                meta.attempts[-1].end = "closed" if end is None else "failed"
                meta.attempts[-1].error = None if end is None else f"{type(end).__name__}: {end}"

            if self._writer.failed is None:
                self._writer.edit(ended)
            self._writer.close()
        finally:
            self._lock.release()
        if refused is not None and (error is None or isinstance(error, ImportRefused)):
            raise refused  # of two places that are refused, the first
        if error is None:
            self._always.check(self._path)
            if self._writer.breach_count:
                raise ImportRefused(f"{self._path}: {self._writer.take_breaches()[0]}.")

    # -- passes that wait ------------------------------------------------------------------------

    def _lay(self) -> None:
        """Hand what waits to the trace's writer, side by side."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            self._hand(self._forward(waiting))
        except ImportRefused:
            if len(waiting) > 1:
                for taken in waiting:  # which it is, is known of one alone
                    self._hand(self._forward([taken]))
            raise

    def _hand(self, forward: Forward) -> None:
        self._handed += forward.row_bytes
        self._writer.put(forward)
        if self._handed > WAITING_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.flush()
        self._handed = 0

    # -- one pass --------------------------------------------------------------------------------

    def _where(self, item: Pass | Counted) -> str:
        return f"{self._path}: {item.where}"

    def _in_order(self, item: Pass | Counted) -> None:
        where = self._where(item)
        if (item.step, item.forward) <= self._last:
            raise ImportRefused(
                f"{where}: step {item.step}, forward {item.forward} after step {self._last[0]}, "
                f"forward {self._last[1]}: passes must be in order, each once."
            )
        self._last = (item.step, item.forward)
        layers = set(item.count_E if isinstance(item, Counted) else item.choices)
        if unknown := layers - set(self._layers):
            raise ImportRefused(f"{where}: there is no layer {min(unknown)}.")
        if self._ran is None:
            self._ran = layers
        if missing := self._ran - layers:
            raise ImportRefused(
                f"{where}: layer {min(missing)} is missing, which ran in the passes before."
            )
        if more := layers - self._ran:
            raise ImportRefused(
                f"{where}: layer {min(more)} ran, which did not in the passes before."
            )

    def _pass(self, item: Pass, where: str) -> _Taken:
        T = _rows(item, where)
        valid = T
        tokens = item.tokens
        if tokens is not None:
            _check_tokens(tokens, T, where)
            if tokens.padding_T is not None:
                valid -= int(np.count_nonzero(tokens.padding_T))
        kind = self._kind(item, valid) if T else None
        return _Taken(item, T, valid, valid * len(item.choices), kind)

    def _kind(self, item: Pass, valid: int) -> tuple[Any, ...] | None:
        """What a pass must have in common with those it is laid beside; None: it stands alone.

        Only those that share a window may be laid beside each other (`windows.stands_alone`), and
        only those whose layers are all alike.
        """
        if item.phase == "train" or item.t_start_ns is not None:
            return None
        first = next(iter(item.choices.values()))
        alike = _arrays(first)
        if any(_arrays(x) != alike for x in item.choices.values()) or has_outputs(first):
            return None
        if first.weights_TK is not None and first.weights_TK.shape != first.ids_TK.shape:
            return None
        K = first.ids_TK.shape[1]
        if any(top_k not in (None, K) or fills(valid, top_k, V) for V, top_k in self._routers):
            return None
        tokens = item.tokens
        return (*alike, item.phase, tokens is None or tokens.token_id_T is None, tokens is None)

    def _kinds(self, choices: dict[int, Choices]) -> Iterator[list[LayerInfo]]:
        """Layers whose arrays can be looked at together."""
        kinds: dict[tuple[Any, ...], list[LayerInfo]] = {}
        for layer, x in choices.items():
            info = self._layers[layer]
            kind = (info.experts, info.zero_experts, info.top_k, x.ids_TK.shape)
            kinds.setdefault((*kind, x.weights_TK is None), []).append(info)
        yield from kinds.values()

    def _forward(self, taken: list[_Taken]) -> Forward:
        """Passes of one kind as one event of the trace's writer."""
        first = taken[0].item
        if isinstance(first, Counted):
            return self._forward_of_counts(taken)
        passes = [x.item for x in taken if isinstance(x.item, Pass)]
        named = [self._named(p.tokens) for p in passes]
        tags = list(dict.fromkeys(tag for each in named for tag in each))
        at_F = [[tags.index(tag) for tag in each] for each in named]
        at = beside(passes, [x.rows for x in taken], tags, at_F, self._where(first))
        out = forward_of_passes(at)
        for infos in self._kinds(first.choices):
            out.layers += layer_counts(infos, at)
        out.layers.sort(key=lambda x: x.layer)
        for x in out.layers:
            assert x.rows is not None
            self._weighted |= x.rows.weights_NK is not None
            self._always.see(x.layer, x.rows.expert_ids_NK)
        for part, p in zip(out.parts or [out], passes, strict=True):
            if p.tokens is not None:
                part.sequences = self._new_sequences(p.tokens)
        return out

    def _named(self, tokens: Tokens | None) -> list[str]:
        """The tags that the tokens of a pass may have; the 33rd of a run is `other`."""
        if tokens is None or tokens.tag_T is None:
            return [self._admit(self._untagged)]
        return [self._admit(t) for t in tokens.tags]

    def _admit(self, tag: str) -> str:
        if tag in self._tags:
            return tag
        if len(self._tags) >= MAX_TAGS:
            self._writer.edit(lambda meta: meta.warnings.__setitem__(MANY_TAGS, 1))
            return OTHER
        self._tags.append(tag)
        return tag

    def _new_sequences(self, tokens: Tokens) -> list[SequenceRow]:
        """Rows of the sequences that this pass is the first to have."""
        numbers, first = np.unique(tokens.sequence_T, return_index=True)
        rows = []
        for number, at in zip(numbers.tolist(), first.tolist(), strict=True):
            if self._begun.add(number):
                at_tag = None if tokens.tag_T is None else int(tokens.tag_T[at])
                tag = self._untagged if at_tag is None else tokens.tags[at_tag]
                rows.append(SequenceRow(number, tag, tokens.request.get(number)))
        return rows

    # -- counts alone ----------------------------------------------------------------------------

    def _counted(self, item: Counted, where: str) -> _Taken:
        infos = [self._layers[layer] for layer in item.count_E]
        for info, count_E in zip(infos, item.count_E.values(), strict=True):
            if info.top_k is None:
                raise ImportRefused(
                    f"{where}: counts alone do not say how many tokens: give --top-k."
                )
            if count_E.shape != (info.experts,):
                raise ImportRefused(
                    f"{where}, layer {info.layer}: counts of {count_E.shape}, not of "
                    f"{info.experts} experts."
                )
        count_X = np.concatenate(list(item.count_E.values())).astype(np.int64)
        tokens_L = _tokens_of(infos, count_X, where)
        shares = item.phase != "train" and not any(
            fills(n, info.top_k, info.experts) for n, info in zip(tokens_L, infos, strict=True)
        )
        kind = (item.phase, *item.count_E) if shares else None
        most = max(tokens_L)
        return _Taken(item, most, most, sum(tokens_L), kind, tokens_L, count_X)

    def _forward_of_counts(self, taken: list[_Taken]) -> Forward:
        items = [x.item for x in taken if isinstance(x.item, Counted)]
        infos = [self._layers[layer] for layer in items[0].count_E]
        ends = np.cumsum([info.experts for info in infos])
        count_LFE = np.split(np.stack([x.count_X for x in taken]), ends[:-1], axis=1)
        out = forward_of(items, np.array([x.tokens for x in taken]))
        out.tags = [self._admit(self._untagged)]
        out.layers += counted_layers(infos, np.array([x.tokens_L for x in taken]), count_LFE)
        out.layers.sort(key=lambda x: x.layer)
        return out


class _Begun:
    """Numbers of sequences that were there before.

    A live trace has new ones for weeks: numbers that follow each other take no room.
    """

    def __init__(self) -> None:
        self._below = 0
        """All below were there."""
        self._above: set[int] = set()

    def add(self, number: int) -> bool:
        """Whether it is new."""
        if 0 <= number < self._below or number in self._above:
            return False
        self._above.add(number)
        while self._below in self._above:
            self._above.remove(self._below)
            self._below += 1
        return True


def _arrays(x: Choices) -> tuple[Any, ...]:
    """What the arrays of layers and passes must have in common to stand in one."""
    weights = x.weights_TK
    return (
        x.ids_TK.dtype,
        x.ids_TK.shape[1],
        None if weights is None else weights.shape == x.ids_TK.shape,
        x.logits_TE is None,
        x.prob_TE is None,
    )


def _tokens_of(infos: list[LayerInfo], count_X: NDArray[np.int64], where: str) -> list[int]:
    """Tokens of each layer, of the counts of all layers in a row."""
    starts = np.cumsum([0, *(info.experts for info in infos[:-1])])
    K_L = np.array([info.top_k for info in infos])
    total_L = np.add.reduceat(count_X, starts)
    least_L, most_L = np.minimum.reduceat(count_X, starts), np.maximum.reduceat(count_X, starts)
    wrong_L = (least_L < 0) | (total_L % K_L != 0) | (most_L > total_L // K_L)
    if wrong_L.any():
        i = int(wrong_L.argmax())
        count_E = count_X[starts[i] : starts[i] + infos[i].experts]
        raise ImportRefused(f"{where}, layer {infos[i].layer}: {_odd(count_E, int(K_L[i]))}")
    tokens: list[int] = (total_L // K_L).tolist()
    return tokens


def _odd(count_E: NDArray[np.int64], K: int) -> str:
    """Why these are no counts of tokens that choose K experts each."""
    total, least, most = int(count_E.sum()), int(count_E.argmin()), int(count_E.argmax())
    if count_E[least] < 0:
        return f"expert {least} has {count_E[least]} tokens."
    if total % K:
        return f"{total:,} choices are no multiple of top-{K}."
    return (
        f"{total // K:,} tokens of top-{K}, but expert {most} has {int(count_E[most]):,} of them: "
        "the top-k is another."
    )


def _rows(item: Pass, where: str) -> int:
    """Tokens of a pass, if all its layers have as many."""
    rows = {layer: len(x.ids_TK) for layer, x in item.choices.items()}
    T = max(rows.values(), default=0)
    for layer, n in rows.items():
        if n != T:
            raise ImportRefused(f"{where}, layer {layer}: {n:,} rows, but {T:,} in another layer.")
        if item.choices[layer].ids_TK.ndim != 2:
            raise ImportRefused(
                f"{where}, layer {layer}: ids of {item.choices[layer].ids_TK.shape}, "
                "not of [tokens, top-k]."
            )
    return T


def _check_tokens(tokens: Tokens, T: int, where: str) -> None:
    arrays = {
        "sequence numbers": tokens.sequence_T,
        "positions": tokens.position_T,
        "token ids": tokens.token_id_T,
        "tags": tokens.tag_T,
        "marks of padding": tokens.padding_T,
    }
    for name, x in arrays.items():
        if x is not None and len(x) != T:
            raise ImportRefused(f"{where}: {len(x):,} {name} for {T:,} tokens.")
    if tokens.position_T.min(initial=0) < 0:
        raise ImportRefused(f"{where}: a position is {int(tokens.position_T.min())}.")
