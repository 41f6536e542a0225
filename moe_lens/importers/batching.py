"""Forwards for sequences that know of none: laid out as a server would run them, and said to be so.

Prompts come in as there is room, cut to so many tokens a forward; then every running sequence
decodes one token a forward; one that ends makes room for the next. Where a file does not say which
tokens are prompt, all are taken at once. Each forward is a step of its own.

L layers, T tokens of a sequence, K choices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.checks import check_text
from moe_lens.importers.source import UNKNOWN_PHASE, Choices, Pass, Sequence, Tokens
from moe_lens.trace.schema import UNTAGGED

IN_FLIGHT = 1 << 18
"""Tokens of running sequences at most, as a key-value cache bounds a server; what is in memory."""


@dataclass(frozen=True)
class Batching:
    """The forwards that are made up. The defaults are near to those of serving engines.

    Attributes:
        tokens: Prompt tokens of one forward at most.
        sequences: Sequences that run at the same time at most: tokens of a decoding forward.

    Raises:
        ValueError: Not above 0.
    """

    tokens: int = 8192
    sequences: int = 256

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sequences < 1:
            raise ValueError(
                f"a forward has at least one token and one sequence, got {self.tokens} and "
                f"{self.sequences}."
            )

    def __str__(self) -> str:
        return (
            f"synthetic: sequences in the order of the file, prompts in forwards of at most "
            f"{self.tokens:,} tokens, decoding {self.sequences:,} sequences at a time"
        )


@dataclass(slots=True)
class _Running:
    """A sequence that has begun."""

    number: int
    of: Sequence
    prompt: int
    done: int = 0


@dataclass(slots=True)
class _Piece:
    """Some tokens of a sequence that run in one forward."""

    running: _Running
    first: int
    last: int


class Batcher:
    """Takes sequences as they come and gives the forwards that are ready.

    Args:
        batching: How many at once.
        layers: Numbers of the layers, in the order of `Sequence.ids_TLK`.
        untagged: Tag of sequences that have none.
        first_step: Number of the first step.
        first_sequence: Number of the first sequence.
    """

    def __init__(
        self,
        batching: Batching,
        layers: list[int],
        *,
        untagged: str = UNTAGGED,
        first_step: int = 0,
        first_sequence: int = 0,
    ) -> None:
        self._batching = batching
        self._layers = layers
        self._untagged = untagged
        self._step = first_step
        self._number = first_sequence
        self._waiting: deque[_Running] = deque()
        self._active: list[_Running] = []
        self._held = self._held_active = 0
        """Tokens of sequences that are here, and of those that run."""
        self._top_k: int | None = None

    def add(self, sequence: Sequence) -> Iterator[Pass]:
        """Take a sequence; give the forwards that can be made without knowing what follows.

        Raises:
            ImportRefused: Its arrays do not fit each other.
        """
        T = check_sequence(sequence, len(self._layers))
        if T == 0:
            return
        if self._top_k not in (None, sequence.ids_TLK.shape[2]):
            raise ImportRefused(
                f"{sequence.where}: top-{sequence.ids_TLK.shape[2]}, but top-{self._top_k} before."
            )
        self._top_k = sequence.ids_TLK.shape[2]
        prompt = T if sequence.prompt_tokens is None else min(sequence.prompt_tokens, T)
        self._waiting.append(_Running(self._number, sequence, prompt))
        self._number += 1
        self._held += T
        # Until all places are taken, what comes next decides what runs beside this one.
        while self._waiting and (
            len(self._waiting) + len(self._active) >= self._batching.sequences
            or self._held >= IN_FLIGHT
        ):
            yield from self._turn()

    def rest(self) -> Iterator[Pass]:
        """The forwards of all that still waits: no sequence follows."""
        while self._waiting or self._active:
            yield from self._turn()

    def _turn(self) -> Iterator[Pass]:
        """Let in whom there is room for, and decode one token of everybody."""
        while self._waiting and (not self._active or self._has_room(self._waiting[0])):
            self._active.append(self._waiting.popleft())
            self._held_active += _T(self._active[-1])
        yield from self._prompts([r for r in self._active if r.done < r.prompt])
        decoding = [_Piece(r, r.done, r.done + 1) for r in self._active if r.done < _T(r)]
        if decoding:
            yield self._forward("decode", decoding)
        ended = sum(_T(r) for r in self._active if r.done == _T(r))
        self._held, self._held_active = self._held - ended, self._held_active - ended
        self._active = [r for r in self._active if r.done < _T(r)]

    def _has_room(self, coming: _Running) -> bool:
        return (
            len(self._active) < self._batching.sequences
            and self._held_active + _T(coming) <= IN_FLIGHT
        )

    def _prompts(self, coming: list[_Running]) -> Iterator[Pass]:
        # One phase a forward, and arrays of one width.
        for phase in ("prefill", UNKNOWN_PHASE):
            pieces: list[_Piece] = []
            room = self._batching.tokens
            for r in coming:
                if (r.of.prompt_tokens is None) != (phase == UNKNOWN_PHASE):
                    continue
                first = r.done
                while first < r.prompt:
                    last = min(first + room, r.prompt)
                    pieces.append(_Piece(r, first, last))
                    room -= last - first
                    first = last
                    if room == 0:
                        yield self._forward(phase, pieces)
                        pieces, room = [], self._batching.tokens
            if pieces:
                yield self._forward(phase, pieces)

    def _forward(self, phase: str, pieces: list[_Piece]) -> Pass:
        ids_TLK = _gather([p.running.of.ids_TLK[p.first : p.last] for p in pieces])
        weights_TLK = _joined(
            [p.running.of.weights_TLK for p in pieces], pieces, np.float32(np.nan)
        )
        choices = {
            layer: Choices(ids_TLK[:, i], None if weights_TLK is None else weights_TLK[:, i])
            for i, layer in enumerate(self._layers)
        }
        step, self._step = self._step, self._step + 1
        where = pieces[0].running.of.where
        if pieces[-1].running is not pieces[0].running:
            where += f" to {pieces[-1].running.of.where}"
        made = Pass(where, step, 0, phase, choices, _tokens(pieces, self._untagged))
        for p in pieces:
            p.running.done = p.last
        return made


def _T(r: _Running) -> int:
    return len(r.of.ids_TLK)


def check_sequence(s: Sequence, layers: int) -> int:
    """Its tokens, if it is a whole sequence of so many layers.

    Raises:
        ImportRefused: Its arrays do not fit each other, or what is said of it is no number or text.
    """
    if s.ids_TLK.ndim != 3 or s.ids_TLK.shape[1] != layers:
        raise ImportRefused(
            f"{s.where}: an array of {s.ids_TLK.shape}, not of [tokens, {layers} layers, top-k]."
        )
    T = len(s.ids_TLK)
    if s.weights_TLK is not None and s.weights_TLK.shape != s.ids_TLK.shape:
        raise ImportRefused(
            f"{s.where}: weights of {s.weights_TLK.shape} for ids of {s.ids_TLK.shape}."
        )
    if s.token_id_T is not None and len(s.token_id_T) != T:
        raise ImportRefused(f"{s.where}: {len(s.token_id_T)} token ids for {T} tokens.")
    # A live trace is given these by its user.
    prompt = 0 if s.prompt_tokens is None else s.prompt_tokens
    said: tuple[Any, ...] = (prompt, s.first_position)
    for what, n in zip(("prompt", "first position"), said, strict=True):
        if not isinstance(n, int | np.integer) or not 0 <= n <= (1 << 31) - T:
            raise ImportRefused(f"{s.where}: a {what} of {n!r}, in a sequence of {T:,} tokens.")
    check_text(s.request, "request's id", s.where)
    check_text(s.tag, "tag", s.where)
    return T


def _gather(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined(
    arrays: list[NDArray[Any] | None], pieces: list[_Piece], missing: np.generic
) -> NDArray[Any] | None:
    """The pieces of the sequences' arrays in one, `missing` where one sequence has none.

    None: no sequence has one.
    """
    known = next((x for x in arrays if x is not None), None)
    if known is None:
        return None
    parts = []
    for x, p in zip(arrays, pieces, strict=True):
        shape = (p.last - p.first, *known.shape[1:])
        parts.append(np.full(shape, missing) if x is None else x[p.first : p.last])
    return _gather(parts)


def _tokens(pieces: list[_Piece], untagged: str) -> Tokens:
    lengths = [p.last - p.first for p in pieces]
    tag_of = [p.running.of.tag or untagged for p in pieces]
    tags = list(dict.fromkeys(tag_of))
    at = [tags.index(tag) for tag in tag_of]
    starts = [p.running.of.first_position for p in pieces]
    return Tokens(
        sequence_T=np.repeat(np.array([p.running.number for p in pieces], np.int64), lengths),
        position_T=np.concatenate(
            [np.arange(s + p.first, s + p.last) for s, p in zip(starts, pieces, strict=True)]
        ).astype(np.int32),
        token_id_T=_joined([p.running.of.token_id_T for p in pieces], pieces, np.int64(-1)),
        tag_T=np.repeat(np.array(at, np.int32), lengths),
        tags=tuple(tags),
        request={
            p.running.number: p.running.of.request
            for p in pieces
            if p.first == 0 and p.running.of.request is not None
        },
    )
