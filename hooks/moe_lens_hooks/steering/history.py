"""Recorded decisions, one for each sequence and position, however they were cut into forwards.

Legend: N recorded tokens, T tokens of a batch, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import SteeringError
from moe_lens_hooks.steering.choice import OWN
from moe_lens_hooks.steering.recorded import LayerRows, Recorded

Ints = NDArray[np.int64]

_SPAN = 32
"""Bits that a position has in a key."""


@dataclass
class Stream:
    """The recorded tokens of one stream, in the order of `key_N`.

    Attributes:
        key_N: Place of the sequence in the high bits, position in the low ones; ascending, unique.
        at_N: Where the decisions about it are (`LayerRows.at_N`).
        text_N: Vocabulary ids; -1 where not kept.
    """

    key_N: Ints
    at_N: Ints
    text_N: Ints


@dataclass
class History:
    """Sequences and what was decided about their tokens.

    Attributes:
        name: The trace, for messages.
        sequences: (rank, number) in the order in which they were recorded.
        requests: The user's request ids of them.
        streams: By name.
        decisions: By number of layer: ids and weights of each row of its stream.
        parents: Place of the sequence that each forked from (beams); -1: none.
    """

    name: str
    sequences: list[tuple[int, int]]
    requests: dict[tuple[int, int], str]
    streams: dict[str, Stream]
    decisions: dict[int, tuple[NDArray[np.int32], NDArray[np.float32] | None]]
    parents: Ints

    def find(self, name: int | str) -> int:
        """Place of the sequence of this request id, or of this number.

        Raises:
            SteeringError: There is none, or several.
        """
        found = [
            i
            for i, key in enumerate(self.sequences)
            if (self.requests.get(key) == name if isinstance(name, str) else key[1] == name)
        ]
        if len(found) != 1:
            what = f"request {name!r}" if isinstance(name, str) else f"sequence {name}"
            many = f"has {len(found)} of {what} (several ranks?)" if found else f"has no {what}"
            known = sorted(self.requests.values())[:3] or [str(n) for _, n in self.sequences[:3]]
            raise SteeringError(f"{self.name} {many}. It has {', '.join(known)}, …")
        return found[0]

    def label(self, sequence: int) -> str:
        """The sequence in words."""
        rank, number = self.sequences[sequence]
        request = self.requests.get((rank, number))
        return f"sequence {number}" if request is None else f"request {request!r}"

    def look_up(self, stream: str, sequence_T: Ints, position_T: Ints) -> Ints:
        """Row of each token in its stream; -1 where nothing was recorded."""
        known = self.streams.get(stream)
        if known is None or not len(known.key_N):
            return np.full(len(sequence_T), -1, np.int64)
        row_T = _search(known.key_N, (sequence_T << _SPAN) | np.maximum(position_T, 0))
        while True:  # what comes before a beam's first token is in the one it forked from
            first_T = self._first(known, sequence_T)
            sequence_T = np.where(position_T < first_T, self.parents[sequence_T], -1)
            before_T = (row_T < 0) & (sequence_T >= 0)
            if not before_T.any():
                return row_T
            sequence_T = np.where(before_T, sequence_T, 0)
            key_T = (sequence_T << _SPAN) | np.maximum(position_T, 0)
            row_T[before_T] = _search(known.key_N, key_T)[before_T]

    def _first(self, stream: Stream, sequence_T: Ints) -> Ints:
        """First recorded position of each sequence; 0 where it has none."""
        row_T = np.searchsorted(stream.key_N, sequence_T << _SPAN).clip(max=len(stream.key_N) - 1)
        key_T = stream.key_N[row_T]
        return np.where(key_T >> _SPAN == sequence_T, key_T & ((1 << _SPAN) - 1), 0)

    def length(self, stream: str, sequence: int) -> int:
        """One more than the last recorded position."""
        key_N = self.streams[stream].key_N
        last = int(np.searchsorted(key_N, (sequence + 1) << _SPAN)) - 1
        if last < 0 or key_N[last] >> _SPAN != sequence:
            return 0
        return int(key_N[last] & ((1 << _SPAN) - 1)) + 1


def history_of(recorded: Recorded) -> History:
    """Sort what was read by sequence and position; the last decision on a position counts."""
    tokens = recorded.tokens
    pairs = np.stack([tokens["rank"], tokens["sequence"]], 1)
    unique, place_N = np.unique(pairs, axis=0, return_inverse=True)
    sequences = [(int(rank), int(number)) for rank, number in unique]
    place_N = place_N.reshape(-1).astype(np.int64)
    streams = {}
    for name in sorted(set(tokens["stream"].tolist())):
        of_stream = tokens["stream"] == name
        streams[name] = _stream(recorded, place_N, of_stream)
    decisions = {
        number: _aligned(rows, streams[rows.info.stream])
        for number, rows in recorded.layers.items()
        if rows.info.stream in streams
    }
    places = {key: i for i, key in enumerate(sequences)}
    parents = [places.get(recorded.parents.get(key, (-1, -1)), -1) for key in sequences]
    return History(
        *(recorded.name, sequences, recorded.requests, streams, decisions),
        np.array(parents, np.int64),
    )


def _stream(recorded: Recorded, place_N: Ints, here_N: NDArray[np.bool_]) -> Stream:
    tokens = {k: v[here_N] for k, v in recorded.tokens.items()}
    place = place_N[here_N]
    counts = ~tokens["padding"].astype(bool) & _kept(recorded, tokens)
    order = np.lexsort((tokens["at"], tokens["position"], place))
    order = order[counts[order]]
    key = (place[order] << _SPAN) | tokens["position"][order]
    newest = np.ones(len(key), bool)
    newest[:-1] = key[1:] != key[:-1]
    chosen = order[newest]
    return Stream(key[newest], tokens["at"][chosen], tokens["token_id"][chosen])


def _kept(recorded: Recorded, tokens: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Not a draft or a beam that was rejected."""
    kept = np.ones(len(tokens["at"]), bool)
    if recorded.rejected:
        numbers = {recorded.forwards.index(key[:3]) for key in recorded.rejected}
        for i in np.flatnonzero(np.isin(tokens["at"] >> 32, list(numbers))):
            forward = recorded.forwards[tokens["at"][i] >> 32]
            token = (*forward, int(tokens["sequence"][i]), int(tokens["position"][i]))
            kept[i] = token not in recorded.rejected
    return kept


def _aligned(
    rows: LayerRows, stream: Stream
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """A layer's decisions in the order of its stream; `OWN` where it has none of a token."""
    if not len(rows.at_N):
        none = np.full((len(stream.at_N), rows.ids_NK.shape[1]), OWN, np.int32)
        return none, rows.weights_NK
    row = np.searchsorted(rows.at_N, stream.at_N).clip(max=len(rows.at_N) - 1)
    here = rows.at_N[row] == stream.at_N
    ids = np.where(here[:, None], rows.ids_NK[row], OWN).astype(np.int32)
    return ids, None if rows.weights_NK is None else rows.weights_NK[row]


def _search(key_N: Ints, key_T: Ints) -> Ints:
    """Row of each key; -1 where there is none."""
    row_T = np.searchsorted(key_N, key_T).clip(max=len(key_N) - 1)
    return np.where(key_N[row_T] == key_T, row_T, -1)
