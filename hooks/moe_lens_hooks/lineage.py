"""The sequences in the rows of a cache: which they are, and what was routed of each.

A cache may be cropped (rejected drafts) or its rows reordered (beams). What was routed is a tree of
nodes, one for each token of each forward; a row is a path in it. A node that no row's path holds
any more is lost: its token is not in what was generated.

Legend: B rows, S positions of one forward, L positions in the cache, N rows kept of a forward.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.trace.events import Outcomes
from moe_lens_hooks.staging import HostCopy

Nodes = NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Line:
    """One sequence.

    Attributes:
        number: Its number on this rank.
        sampled_as: The number that decides whether its rows are kept: a fork's is its origin's.
        request: The user's id.
        parent: The sequence that it forked from.
        told: The table `sequences` has it.
    """

    number: int
    sampled_as: int
    request: Any = None
    parent: int | None = None
    told: bool = False


@dataclass(slots=True)
class Routed:
    """One forward's tokens, as far as their per-token rows are kept.

    Attributes:
        step, forward: Which forward.
        shape: (B, S) of its new tokens.
        again: Tokens of each row before them, which earlier forwards routed.
        layout: How the model flattens.
        token_N: Flat indices of the kept ones, in order; None: none is.
        sequence_N: Their sequences.
        position_N: Their positions, maybe on a device.
        padding_T: Padding of the whole forward, maybe on a device; None: none.
        before_B: The node before the first of each row; -1: there is none.
    """

    step: int
    forward: int
    shape: tuple[int, int]
    again: int
    layout: str
    token_N: NDArray[np.int64] | None
    sequence_N: NDArray[np.int64] | None
    position_N: Tensor | None
    padding_T: Tensor | None
    before_B: Nodes | None = None

    def flat(self, within: Nodes) -> NDArray[np.int64]:
        """Flat tokens of the forward from indices into `[B, S]`."""
        B, S = self.shape
        row, at = np.divmod(within, S)
        at = at + self.again
        return row * (S + self.again) + at if self.layout == "bs" else at * B + row


class Rows:
    """The rows of one cache.

    Args:
        lines: Their sequences.
        past: Positions that the cache held before anything of it was seen.
    """

    def __init__(self, lines: Sequence[Line], past: int = 0) -> None:
        self.lines = list(lines)
        self.length = past
        """Positions in the cache."""
        self.forwards: list[Routed] = []
        self.moved = False
        """The rows were reordered since the last forward."""
        self._firsts: list[int] = []
        self._next = 0
        self._paths: list[Nodes] = [np.full((len(self.lines), past), -1)] if past else []

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, routed: Routed) -> None:
        """A forward added S positions to every row."""
        B, S = routed.shape
        routed.before_B = self._paths[-1][:, -1] if self._paths else np.full(B, -1)
        self.forwards.append(routed)
        self._firsts.append(self._next)
        if S:
            self._paths.append(self._next + np.arange(B * S).reshape(B, S))
        self._next += B * S
        self.length += S
        self.moved = False

    def skip(self, positions: int) -> None:
        """The cache grew by positions that nobody saw."""
        self._paths.append(np.full((len(self), positions), -1))
        self.length += positions

    def cut(self, length: int) -> Nodes:
        """Keep the first `length` positions; the nodes that this loses."""
        lost = []
        while self.length > length:
            last = self._paths.pop()
            keep = max(0, last.shape[1] - (self.length - length))
            lost.append(last[:, keep:].ravel())
            self.length -= last.shape[1] - keep
            if keep:
                self._paths.append(last[:, :keep])
        return _seen(lost)

    def reorder(self, source: Sequence[int], fork: Callable[[Line], Line]) -> Nodes:
        """Row i goes on with what was row `source[i]`; the nodes that this loses.

        Args:
            source: Rows as they were; those not in it end here, one that is in it twice forks.
            fork: Makes the sequence of a further row that goes on with one.
        """
        before = np.concatenate([np.zeros((len(self), 0), np.int64), *self._paths], axis=1)
        after = before[list(source)]
        taken: set[int] = set()
        lines = []
        for row in source:
            lines.append(fork(self.lines[row]) if row in taken else self.lines[row])
            taken.add(row)
        ended = [row for row in range(len(before)) if row not in taken]
        self.lines, self.moved = lines, True
        self._paths = [after] if after.shape[1] else []
        return _seen([np.setdiff1d(before[ended], after)])

    def path(self, forward: int, row: int) -> list[int]:
        """The nodes of a row as it was after one of `forwards`, from its last token back."""
        S = self.forwards[forward].shape[1]
        node = self._firsts[forward] + row * S + S - 1
        nodes: list[int] = []
        while node >= 0:
            at = self._of(node)
            row, within = divmod(node - self._firsts[at], self.forwards[at].shape[1])
            nodes += range(node, node - within - 1, -1)
            before_B = self.forwards[at].before_B
            assert before_B is not None
            node = int(before_B[row])
        return nodes

    def since(self, forward: int) -> Nodes:
        """All nodes of a forward and those after it."""
        first = self._firsts[forward] if forward < len(self._firsts) else self._next
        return np.arange(first, self._next)

    def tokens(self, nodes: Nodes) -> list[tuple[Routed, NDArray[np.int64]]]:
        """Nodes as flat tokens of their forwards."""
        found: dict[int, list[int]] = {}
        for node in nodes.tolist():
            at = self._of(node)
            found.setdefault(at, []).append(node - self._firsts[at])
        return [
            (self.forwards[at], self.forwards[at].flat(np.array(within)))
            for at, within in found.items()
        ]

    def _of(self, node: int) -> int:
        """The forward that a node is of."""
        return bisect_right(self._firsts, node) - 1


class StagedOutcomes:
    """Tokens of which it is known now whether they were kept, on their way to the writer.

    Args:
        tokens: Flat tokens of forwards; those without per-token rows, and padding, are left out.
        kept: Whether they are in what was generated.
    """

    def __init__(self, tokens: Sequence[tuple[Routed, NDArray[np.int64]]], *, kept: bool) -> None:
        self._tokens = [(r, at) for r, at in tokens if r.position_N is not None]
        self._kept = kept
        tensors = (t for r, _ in self._tokens for t in (r.position_N, r.padding_T))
        self._copy = HostCopy([t for t in tensors if t is not None])

    def resolve(self) -> Outcomes:
        landed = iter(self._copy.arrays())
        steps, forwards, sequences, positions = [], [], [], []
        for routed, at in self._tokens:
            assert routed.token_N is not None
            assert routed.sequence_N is not None
            position_N = next(landed)
            here_N = np.isin(routed.token_N, at)
            if routed.padding_T is not None:
                here_N &= ~next(landed)[routed.token_N]
            n = int(here_N.sum())
            steps.append(np.full(n, routed.step, np.int64))
            forwards.append(np.full(n, routed.forward, np.int32))
            sequences.append(routed.sequence_N[here_N])
            positions.append(position_N[here_N].astype(np.int32))
        return Outcomes(
            step_N=_joined(steps, np.int64),
            forward_N=_joined(forwards, np.int32),
            sequence_N=_joined(sequences, np.int64),
            position_N=_joined(positions, np.int32),
            kept=self._kept,
        )


def _seen(parts: list[Nodes]) -> Nodes:
    nodes = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))
    return nodes[nodes >= 0]


def _joined(parts: list[Any], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *parts])
