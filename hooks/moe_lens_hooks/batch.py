"""The tokens of one forward: which sequence, position and tag each has, and which are padding.

Users say it per step with one value, a value per sequence `[B]`, per token `[B, S]`, or, for
packed rows, with cumulative lengths. Here it becomes one array per token, in the order in which
the model flattens its batch.

Legend: B sequences (rows), S positions, T = B S tokens, P packed sequences, G tags, N sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.trace.schema import UNTAGGED

Layout = str
"""How a model flattens: "bs" (token t = b S + s) or "sb" (t = s B + b, as Megatron does)."""


@dataclass
class StepContext:
    """What the user said of a step; see `Recorder.step`."""

    tags: Any = None
    sequences: Any = None
    padding: Any = None
    phase: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


@dataclass
class Batch:
    """The tokens of one forward, on the model's device where tensors.

    Attributes:
        shape: (B, S).
        tags: Names of the tags, G.
        group_T: int; tag, or G + tag for padding. None: one tag and no padding.
        padded: There may be padding: groups are 2 G.
        tokens_G: Valid tokens by tag.
        sequence_T: Number of the sequence on this rank (host).
        tag_T: Index of the tag (host).
        padding_T: bool (host or device); None: no padding.
        rows_N, position_N: Sampled tokens and their positions in their sequences; None: none.
        first_seen: Packed or plain sequences that begin here: (number, tag index, user's id, row).
    """

    shape: tuple[int, int]
    tags: list[str]
    group_T: Tensor | None
    padded: bool
    tokens_G: Tensor
    sequences_G: NDArray[np.int64]
    sequence_T: NDArray[np.int64]
    tag_T: NDArray[np.int32]
    padding_T: Tensor | None
    rows_N: Tensor | None
    position_N: Tensor | None
    first_seen: list[tuple[int, int, Any, int]]

    @property
    def size(self) -> int:
        """T."""
        return self.shape[0] * self.shape[1]


def padding_from_mask(mask: Any, batch: int, length: int) -> Tensor | None:
    """Padding `[B, S]` from an attention mask of the same forward; None where it has none.

    While decoding, the mask covers the past too: its last S columns are this forward's.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch:
        return None
    if mask.shape[1] < length:
        return None
    return mask[:, -length:] == 0


class Describer:
    """Turns what users say into a `Batch`; remembers sequence numbers and tags across forwards.

    Args:
        admit: Turns a tag into itself, or into `other` where there are too many.
        layout: How the model flattens its batch.
        first_sequence: Number of the first sequence.
    """

    def __init__(
        self, admit: Callable[[str], str], layout: Layout = "bs", first_sequence: int = 0
    ) -> None:
        if layout not in ("bs", "sb"):
            raise ValueError(f'layout={layout!r} must be "bs" or "sb"')
        self._admit = admit
        self._layout = layout
        self._next_sequence = first_sequence
        self._by_request: dict[Any, int] = {}
        self._running: NDArray[np.int64] | None = None

    def describe(
        self,
        shape: tuple[int, int],
        context: StepContext,
        *,
        padding: Tensor | None,
        positions: Tensor | None,
        past: int,
        continues: bool,
        keeps: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
        device: torch.device,
    ) -> Batch:
        """Describe the tokens of one forward.

        Args:
            shape: (B, S).
            context: What the user said.
            padding: bool `[B, S]` as far as the model's own inputs tell.
            positions: int `[B, S]` if the model was given them.
            past: Positions before this forward (length of the cache).
            continues: These rows go on with the sequences of the forward before (decoding).
            keeps: Of sequence numbers, those whose rows are kept.
            device: Where the model's tensors are.

        Raises:
            ValueError: What the user said does not fit the batch.
        """
        B, S = shape
        T = B * S
        sequence_T, position_T, owner_T, first = self._sequences(
            B, S, context.sequences, past, continues
        )
        names, tag_T = self._tags(context.tags, B, S, owner_T)
        pad = _padding(context.padding, padding, B, S, device)
        padding_T = None if pad is None else (pad if self._layout == "bs" else pad.T).reshape(-1)
        G = len(names)
        group_T, tokens_G = None, torch.full((1,), T, dtype=torch.int64, device="cpu")
        if G > 1 or padding_T is not None:
            group_T = torch.from_numpy(tag_T).to(device)
            if padding_T is not None:
                group_T = group_T + padding_T.int() * G
            groups = G * (1 if padding_T is None else 2)
            counted = torch.zeros(groups, dtype=torch.int64, device=device)
            counted.index_add_(0, group_T, torch.ones_like(group_T, dtype=torch.int64))
            tokens_G = counted[:G]
        kept_T = keeps(sequence_T) if T else np.zeros(0, bool)
        rows, position_N = None, None
        if kept_T.any():
            rows = torch.from_numpy(np.flatnonzero(kept_T)).to(device)
            position_N = torch.from_numpy(position_T[kept_T])
            if positions is not None and tuple(positions.shape) in ((B, S), (1, S)):
                given = positions.detach().expand(B, S)
                given = given if self._layout == "bs" else given.T
                position_N = given.reshape(-1)[rows]
        _, at = np.unique(sequence_T, return_index=True)
        by_tag = np.bincount(tag_T[at], minlength=G) if T else np.zeros(G, np.int64)
        started = [
            (number, int(tag_T[t]), said, row) for number, t, said, row in first if kept_T[t]
        ]
        return Batch(
            shape,
            names,
            group_T,
            padding_T is not None,
            tokens_G,
            by_tag.astype(np.int64),
            sequence_T,
            tag_T,
            padding_T,
            rows,
            position_N,
            started,
        )

    def _flat(self, x_BS: NDArray[Any]) -> NDArray[Any]:
        return (x_BS if self._layout == "bs" else x_BS.T).reshape(-1)

    def _sequences(
        self, B: int, S: int, said: Any, past: int, continues: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], list[Any]]:
        """Sequence and position of each token, its owner (row, or packed sequence), new ones."""
        T = B * S
        values = None if said is None else _listed(said)
        cumulative = None if values is None else _cumulative(values, B, T)
        if cumulative is not None:
            lengths = np.diff(cumulative)
            owner_T = np.repeat(np.arange(len(lengths)), lengths)
            position_T = (np.arange(T) - np.repeat(cumulative[:-1], lengths)).astype(np.int32)
            numbers = self._new(len(lengths))
            firsts = [
                (int(n), int(t), None, i)
                for i, (n, t) in enumerate(zip(numbers, cumulative[:-1], strict=True))
                if lengths[i]
            ]
            self._running = None
            return numbers[owner_T], position_T, owner_T, firsts
        positions_BS = np.broadcast_to(past + np.arange(S, dtype=np.int32), (B, S))
        row_BS = np.broadcast_to(np.arange(B)[:, None], (B, S))
        if values is not None and values and isinstance(values[0], list):
            _fits("sequences", [len(values), len(values[0])], B, S)
            return self._packed(np.array(values), row_BS)
        if values is not None:
            _fits("sequences", [len(values)], B, S)
            new = [v not in self._by_request for v in values]
            for v in values:
                if v not in self._by_request:
                    self._by_request[v] = int(self._new(1)[0])
            numbers = np.array([self._by_request[v] for v in values], np.int64)
        elif continues and self._running is not None and len(self._running) == B:
            numbers, new, values = self._running, [False] * B, [None] * B
        else:
            numbers, new, values = self._new(B), [True] * B, [None] * B
        self._running = numbers
        step = S if self._layout == "bs" else 1
        firsts = [(int(numbers[b]), b * step, values[b], b) for b in range(B) if new[b] and S]
        owner_T = self._flat(row_BS)
        return numbers[owner_T], self._flat(positions_BS), owner_T, firsts

    def _packed(
        self, ids_BS: NDArray[Any], row_BS: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], list[Any]]:
        """Sequence ids per token: a run of one id within a row is a sequence."""
        new_BS = np.ones(ids_BS.shape, bool)
        new_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
        run_BS = new_BS.reshape(-1).cumsum().reshape(ids_BS.shape) - 1
        numbers = self._new(int(new_BS.sum()))
        starts = np.maximum.accumulate(
            np.where(new_BS, np.arange(ids_BS.shape[1])[None], 0), axis=1
        )
        position_BS = (np.arange(ids_BS.shape[1])[None] - starts).astype(np.int32)
        where = np.argsort(self._flat(np.arange(ids_BS.size).reshape(ids_BS.shape)))
        at = np.flatnonzero(new_BS.reshape(-1))
        said = ids_BS.reshape(-1)[at]
        rows = row_BS.reshape(-1)[at]
        firsts = [
            (int(numbers[i]), int(where[t]), said[i].item(), int(rows[i])) for i, t in enumerate(at)
        ]
        self._running = None
        return numbers[self._flat(run_BS)], self._flat(position_BS), self._flat(row_BS), firsts

    def _new(self, n: int) -> NDArray[np.int64]:
        numbers = np.arange(self._next_sequence, self._next_sequence + n, dtype=np.int64)
        self._next_sequence += n
        return numbers

    def _tags(
        self, said: Any, B: int, S: int, owner_T: NDArray[np.int64]
    ) -> tuple[list[str], NDArray[np.int32]]:
        T = B * S
        if said is None:
            said = UNTAGGED
        values = [said] if isinstance(said, str) else _listed(said)
        if (
            not isinstance(said, Sequence | np.ndarray | Tensor)
            or isinstance(said, str)
            or not np.ndim(said)
        ):
            return [self._admit(str(values[0]))], np.zeros(T, np.int32)
        if values and isinstance(values[0], list):
            _fits("tags", [len(values), len(values[0])], B, S)
            flat = self._flat(np.array(values, dtype=object))
        else:
            owners = int(owner_T.max()) + 1 if T else B
            if len(values) != owners:
                unit = "sequences" if owners == B else "packed sequences"
                raise ValueError(
                    f"tags has {len(values)} values, but this forward has {owners} {unit} "
                    f"(batch {B} x {S} tokens). Give one value, one per sequence, or [B, S]."
                )
            flat = np.array(values, dtype=object)[owner_T]
        admitted: dict[Any, str] = {v: self._admit(str(v)) for v in set(flat.tolist())}
        names = sorted(set(admitted.values())) or [UNTAGGED]
        index = {v: names.index(name) for v, name in admitted.items()}
        return names, np.array([index[v] for v in flat.tolist()], np.int32)


def _listed(said: Any) -> list[Any]:
    """Tensors, arrays and sequences as lists."""
    if isinstance(said, Tensor | np.ndarray):
        return list(said.tolist()) if said.ndim else [said.item()]
    if isinstance(said, Sequence) and not isinstance(said, str):
        return [
            _listed(x) if isinstance(x, list | tuple | np.ndarray | Tensor) else x for x in said
        ]
    return [said]


def _cumulative(values: list[Any], B: int, T: int) -> NDArray[np.int64] | None:
    """The values as cumulative lengths, if that is what they are: 0, …, T, never falling."""
    if len(values) == B or len(values) < 2 or not all(isinstance(v, int) for v in values):
        return None
    lengths = np.array(values, np.int64)
    if lengths[0] != 0 or (np.diff(lengths) < 0).any():
        return None
    if lengths[-1] != T:
        raise ValueError(
            f"sequences looks like cumulative lengths that end at {lengths[-1]}, but this forward "
            f"has {T} tokens."
        )
    return lengths


def _fits(name: str, got: list[int], B: int, S: int) -> None:
    if got not in ([B], [B, S]):
        raise ValueError(
            f"{name} has shape {got}, but this forward is a batch of {B} x {S} tokens. Give one "
            f"value, one per sequence [{B}], one per token [{B}, {S}], or cumulative lengths."
        )


def _padding(
    said: Any, from_mask: Tensor | None, B: int, S: int, device: torch.device
) -> Tensor | None:
    """Padding `[B, S]` (True: padding) from what the user said, else from the model's mask."""
    if said is None:
        return from_mask
    if isinstance(said, bool):
        return torch.ones((B, S), dtype=torch.bool, device=device) if said else None
    given = torch.as_tensor(said)
    if given.ndim == 1 and given.dtype != torch.bool:  # valid lengths, padding on the right
        _fits("padding", [len(given)], B, S)
        return torch.arange(S, device=device)[None] >= given.to(device)[:, None]
    _fits("padding", list(given.shape), B, S)
    if given.ndim == 1:
        given = given[:, None].expand(B, S)
    return given.to(device=device, dtype=torch.bool, copy=True)
