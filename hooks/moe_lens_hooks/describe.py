"""From what the user said and the model was given, the tokens of a forward: a `Batch`.

Legend: B sequences (rows), S positions, T = B S tokens, P sequences (B, or how many are packed),
G tags, N sampled rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.trace.schema import UNTAGGED
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.following import Going
from moe_lens_hooks.lineage import Line, Rows
from moe_lens_hooks.masks import positions_without
from moe_lens_hooks.owners import (
    Layout,
    Owners,
    flat,
    owned_by_lengths,
    owned_by_rows,
    owned_by_runs,
    owned_on_device,
    restarts,
    runs,
)
from moe_lens_hooks.said import (
    StepContext,
    cumulative,
    expanded,
    fits,
    keys_of,
    padding_said,
    tags_of,
)
from moe_lens_hooks.staging import onto, to_device

REQUESTS = 65_536
"""Request ids that are remembered; one that comes again after so many others is a new sequence."""

Keeps = Callable[[NDArray[np.int64]], NDArray[np.bool_]]


@dataclass
class Given:
    """What the model's own arguments tell of a forward's tokens.

    Attributes:
        padding: bool `[B, S]`; None: nothing.
        mask: What it was read from.
        positions: int `[B, S]` or `[1, S]`, if the model was given them.
        lengths: Cumulative lengths of packed sequences.
        carried: Sequences of another stream with as many rows, which this one goes on with.
    """

    padding: Tensor | None = None
    mask: Any = None
    positions: Tensor | None = None
    lengths: Tensor | list[int] | None = None
    carried: list[Line] | None = None


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
        self._next = first_sequence
        self._requests: OrderedDict[tuple[Any, int], Line] = OrderedDict()

    def fork(self, line: Line) -> Line:
        """A new sequence that goes on from one."""
        return self._line(line.request, sampled_as=line.sampled_as, parent=line.number)

    def describe(
        self,
        shape: tuple[int, int],
        context: StepContext,
        given: Given,
        going: Going,
        keeps: Keeps,
        device: torch.device,
    ) -> tuple[Batch, Rows | None]:
        """Describe the tokens of one forward.

        Args:
            shape: (B, S).
            context: What the user said.
            given: What the model's arguments tell.
            going: How it goes on from the forwards before.
            keeps: Of sequence numbers, those whose rows are kept.
            device: Where the model's tensors are.

        Returns:
            The batch, and the rows that it goes on with; None where sequences are packed.

        Raises:
            ValueError: What the user said does not fit the batch.
        """
        B, S = shape
        owners, rows = self._owners(B, S, context.sequences, given, going)
        P = len(owners.lines)
        names, tag_P, tag_T = self._tags(context.tags, B, S, owners, going.expand)
        pad_BS = given.padding
        if context.padding is not None:
            pad_BS = padding_said(context.padding, B, S, going.expand, device)
        padding_T = self._excluded(pad_BS, owners, going.again, S, device)
        token_N, kept_P = self._kept(owners, keeps, going.again, B, S)
        rows_N, position_N = None, None
        if token_N is not None:
            whole = len(token_N) == B * S
            rows_N = torch.arange(B * S, device=device) if whole else to_device(token_N, device)
            position_N = self._positions(shape, given, going, owners, pad_BS, token_N, rows_N)
        batch = Batch(
            shape,
            names,
            *_groups(len(names), owners, tag_P, tag_T, padding_T, B * S, device),
            owners=owners,
            tag_P=tag_P,
            tag_T=tag_T,
            padding_T=padding_T,
            token_N=token_N,
            rows_N=rows_N,
            position_N=position_N,
            begin_P=[p for p in range(P) if kept_P[p] and not owners.lines[p].told],
            keys=keys_of(context.keys, max(owners.row_P, default=-1) + 1, going.expand),
            restarts=_unseen(given, going, owners, context.sequences),
        )
        if S:
            for p in batch.begin_P:
                owners.lines[p].told = True
        return batch, rows

    # -- whose tokens they are -------------------------------------------------------------------

    def _owners(
        self, B: int, S: int, said: Any, given: Given, going: Going
    ) -> tuple[Owners, Rows | None]:
        T = B * S
        lengths = cumulative(said, B, T)
        if lengths is not None:
            return owned_by_lengths(self._lines(len(lengths) - 1), lengths, T), None
        if isinstance(said, list) and said and isinstance(said[0], list):
            fits("sequences", [len(said), len(said[0])], B, S)
            ids_BS = np.array(said)
            new_BS = runs(ids_BS)
            lines = [self._line(v) for v in ids_BS[new_BS].tolist()]
            return owned_by_runs(lines, new_BS, self._layout), None
        if said is None and not going.cached and given.carried is None:
            packed = self._packed(B, S, given, going)
            if packed is not None:
                return packed, None
        rows = self._rows(B, S, said, given, going)
        return owned_by_rows(rows.lines, S, self._layout), rows

    def _packed(self, B: int, S: int, given: Given, going: Going) -> Owners | None:
        """Sequences that the model's own arguments say are packed."""
        lengths = given.lengths
        if isinstance(lengths, Tensor) and lengths.device.type == "cpu":
            lengths = lengths.tolist()
        if isinstance(lengths, Tensor) and B == 1:
            return owned_on_device(self._lines(len(lengths) - 1), lengths, S)
        if isinstance(lengths, list) and B == 1 and lengths[0] == 0 and lengths[-1] <= S:
            known = np.array(lengths, np.int64)
            return owned_by_lengths(self._lines(len(known) - 1), known, S)
        if _may_pack(given, going) and given.positions is not None:
            positions = given.positions
            if positions.device.type == "cpu" and positions.shape[1] == S > 1:
                new_BS = np.ones((B, S), bool)
                new_BS[:, 1:] = restarts(positions).expand(B, S - 1).numpy()
                if new_BS[:, 1:].any():
                    lines = self._lines(int(new_BS.sum()))
                    return owned_by_runs(lines, new_BS, self._layout)
        return None

    def _rows(self, B: int, S: int, said: Any, given: Given, going: Going) -> Rows:
        """The rows of a forward whose sequences are not packed."""
        rows, values = going.rows, None
        if said is not None:
            values = expanded(said if isinstance(said, list) else [said], B, going.expand)
            fits("sequences", [len(values)], B, S)
        if rows is not None and len(rows) == B:
            if values is None or values == [x.request for x in rows.lines]:
                return rows
        elif rows is not None and values is None and going.sure:
            going.problem = (
                f"the cache held {len(rows)} rows, and the forward that goes on with it has {B}: "
                "which sequences they are cannot be seen. Name them: rec.step(sequences=[...])"
            )
        if values is not None:
            lines = [self._request(v, values[:b].count(v)) for b, v in enumerate(values)]
        elif given.carried is not None and len(given.carried) == B:
            lines = given.carried
        else:
            lines = self._lines(B)
        return Rows(lines, going.past)

    def _request(self, value: Any, copy: int) -> Line:
        """The sequence of a request id (of its n-th copy in the batch), new or known."""
        key = (value, copy)
        line = self._requests.get(key)
        if line is None:
            line = self._requests[key] = self._line(value)
        self._requests.move_to_end(key)
        if len(self._requests) > REQUESTS:
            self._requests.popitem(last=False)
        return line

    def _lines(self, n: int) -> list[Line]:
        return [self._line(None) for _ in range(n)]

    def _line(
        self, request: Any, *, sampled_as: int | None = None, parent: int | None = None
    ) -> Line:
        number, self._next = self._next, self._next + 1
        return Line(number, number if sampled_as is None else sampled_as, request, parent)

    # -- what they are ---------------------------------------------------------------------------

    def _tags(
        self, said: Any, B: int, S: int, owners: Owners, expand: int
    ) -> tuple[list[str], NDArray[np.int64] | None, NDArray[np.int64] | None]:
        """Names of the tags, and their index by sequence or by token."""
        P = len(owners.lines)
        values = tags_of(said, B, S, P, owners.unit, expand)
        per_token = bool(values) and isinstance(values[0], list)
        each = [v for row in values for v in row] if per_token else values
        if not isinstance(said, list):
            return [self._admit(str(values[0]))], np.zeros(P, np.int64), None
        admitted = {v: self._admit(str(v)) for v in dict.fromkeys(each)}
        names = sorted(set(admitted.values())) or [self._admit(UNTAGGED)]
        index = np.array([names.index(admitted[v]) for v in each], np.int64)
        if per_token:
            return names, None, flat(index.reshape(B, S), self._layout)
        return names, index, None

    def _excluded(
        self, pad_BS: Tensor | None, owners: Owners, again: int, S: int, device: torch.device
    ) -> Tensor | None:
        """Tokens in no count: padding, or routed before."""
        if again:
            before_BS = (torch.arange(S, device=device) < again).expand(len(owners.lines), S)
            pad_BS = before_BS if pad_BS is None else before_BS | onto(pad_BS, device)
        if pad_BS is None:
            return None if owners.beyond_T is None else owners.beyond_T.to(device)
        out = onto((pad_BS if self._layout == "bs" else pad_BS.T).reshape(-1), device)
        return out if owners.beyond_T is None else out | owners.beyond_T.to(device)

    def _kept(
        self, owners: Owners, keeps: Keeps, again: int, B: int, S: int
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_]]:
        """Tokens whose rows are kept (None: none), and for each sequence whether its are."""
        P = len(owners.lines)
        kept_P = np.zeros(P, bool)
        if not B * S or not P:
            return None, kept_P
        kept_P = keeps(np.array([x.sampled_as for x in owners.lines], np.int64))
        if isinstance(owners.owner_T, Tensor):
            # how many tokens a sequence has, only the device knows: all are kept, or none
            kept_P = np.full(P, kept_P[0])
        if not kept_P.any():
            return None, kept_P
        if kept_P.all() and not again:
            return np.arange(B * S), kept_P
        kept_T = np.ones(B * S, bool)
        if isinstance(owners.owner_T, np.ndarray):
            kept_T = kept_P[owners.owner_T]
        if again:
            new_BS = np.broadcast_to(np.arange(S)[None] >= again, (B, S))
            kept_T = kept_T & flat(new_BS, self._layout)
        token_N = np.flatnonzero(kept_T)
        return (token_N if len(token_N) else None), kept_P

    def _positions(
        self,
        shape: tuple[int, int],
        given: Given,
        going: Going,
        owners: Owners,
        pad_BS: Tensor | None,
        token_N: NDArray[np.int64],
        rows_N: Tensor,
    ) -> Tensor:
        """Positions of the kept tokens: as the model was given them, else counted."""
        B, S = shape
        x_BS: Tensor | None = None
        if given.positions is not None and tuple(given.positions.shape) in ((B, S), (1, S)):
            x_BS = given.positions.detach().expand(B, S)
        elif isinstance(owners.position_T, Tensor):
            return owners.position_T[rows_N]
        elif owners.position_T is not None:
            return torch.from_numpy(owners.position_T[token_N])
        elif pad_BS is not None and going.start is None:
            x_BS = positions_without(pad_BS, given.mask, going.past)
        elif going.start is not None:
            x_BS = (going.start + torch.arange(S, device=rows_N.device)).expand(B, S)
        if x_BS is None:
            position_BS = np.broadcast_to(going.past + np.arange(S), (B, S))
            return torch.from_numpy(flat(position_BS, self._layout)[token_N])
        x_T = (x_BS if self._layout == "bs" else x_BS.T).reshape(-1)
        at_N = rows_N if x_T.device == rows_N.device else to_device(token_N, x_T.device)
        return x_T[at_N]


def _groups(
    G: int,
    owners: Owners,
    tag_P: NDArray[np.int64] | None,
    tag_T: NDArray[np.int64] | None,
    padding_T: Tensor | None,
    T: int,
    device: torch.device,
) -> tuple[Tensor | None, bool, Tensor]:
    """`group_T`, whether there may be padding, and valid tokens by tag."""
    if G == 1 and padding_T is None:
        return None, False, torch.full((1,), T, dtype=torch.int64, device="cpu")
    if G == 1 and padding_T is not None:
        group_T = padding_T.long()
    else:
        if tag_T is not None:
            group_T = to_device(tag_T, device)
        elif isinstance(owners.owner_T, Tensor):
            assert tag_P is not None
            group_T = to_device(tag_P, device)[owners.owner_T]
        else:
            assert tag_P is not None
            group_T = to_device(tag_P[owners.owner_T], device)
        if padding_T is not None:
            group_T = group_T + padding_T.long() * G
    groups = G if padding_T is None else 2 * G
    counted = torch.zeros(groups, dtype=torch.int64, device=group_T.device)
    counted.index_add_(0, group_T, torch.ones_like(group_T))
    return group_T, padding_T is not None, counted[:G]


def _may_pack(given: Given, going: Going) -> bool:
    """Positions that start again mean packed sequences only where nothing else explains it."""
    return (
        given.positions is not None
        and given.positions.ndim == 2
        and given.mask is None
        and going.cache is None
        and going.phase is None
    )


def _unseen(given: Given, going: Going, owners: Owners, said: Any) -> Tensor | None:
    """On a device: how often positions start again in what is taken for one sequence."""
    positions = given.positions
    if said is not None or owners.position_T is not None or not _may_pack(given, going):
        return None
    if positions is None or positions.device.type == "cpu":
        return None
    return restarts(positions).sum()
