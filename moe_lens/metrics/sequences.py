"""The tokens of a layer along their sequences: what follows what, and the same in other orders.

Two tokens follow each other if they stand in one sequence, at positions that differ by one: nothing
crosses the boundary of a sequence, or a gap in its rows. The null deals the layer's own tokens out
to the same places anew, which keeps each expert's load and each token's set.

Legend: N tokens, K choices of a token, E experts, W words of 64 bits, P pairs of tokens, R draws,
S sequences, M measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.chance import FORWARD_DRAWS, SEED, Floats, Ints

SHORT, LONG = 4, 32
"""Tokens of a window; powers of two."""
PREFIX = 8
"""Tokens that a prefix has at least; so has what comes after it."""
MEASURES = (
    "repeated_first", "repeated_any", "overlap", "overlap_jaccard", "working_set_4",
    "working_set_32",
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """A layer's tokens, whole sequences one after another.

    Attributes:
        ids_NK: Choices, the largest gate weight first; -1: a token chose fewer.
        sequence_N: Ascending.
        position_N: Ascending in each sequence.
        experts: E.
    """

    ids_NK: Ints
    sequence_N: Ints
    position_N: Ints
    experts: int

    def __len__(self) -> int:
        return len(self.ids_NK)

    @cached_property
    def counts_E(self) -> Ints:
        """Choices of each expert."""
        return np.bincount(self.ids_NK[self.ids_NK >= 0], minlength=self.experts)

    @cached_property
    def first_N(self) -> Ints:
        """The expert with the largest gate weight; -1: none."""
        return self.ids_NK[:, 0] if self.ids_NK.shape[1] else np.full(len(self), -1)

    @cached_property
    def sets_WN(self) -> NDArray[np.uint64]:
        """Each token's experts as bits."""
        out_WN = np.zeros((-(-self.experts // 64), len(self)), np.uint64)
        for id_N in self.ids_NK.T:
            at = np.flatnonzero(id_N >= 0)
            out_WN[id_N[at] // 64, at] |= np.uint64(1) << (id_N[at] % 64).astype(np.uint64)
        return out_WN

    def follow(self, lag: int = 1) -> tuple[Ints, Ints]:
        """Tokens that stand so many positions apart in one sequence: earlier and later, `[P]`."""
        if not len(self):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        # A place on one line; the next sequence begins further off than any lag reaches.
        span = self.position_N.max() - self.position_N.min() + lag + 1
        place_N = self.sequence_N * span + self.position_N
        at_N = np.minimum(np.searchsorted(place_N, place_N + lag), len(self) - 1)
        earlier_P = np.flatnonzero(place_N[at_N] == place_N + lag)
        return np.asarray(earlier_P, np.int64), np.asarray(at_N[earlier_P], np.int64)

    @cached_property
    def found(self) -> dict[str, float]:
        """Each of `MEASURES`; NaN where no tokens stand so."""
        return dict(zip(MEASURES, self._measured(np.arange(len(self))), strict=True))

    @cached_property
    def drawn(self) -> dict[str, Floats]:
        """`[R]` of each of them: the tokens dealt out anew."""
        measured_RM = np.array([self._measured(order_N) for order_N in orders(len(self))])
        return dict(zip(MEASURES, measured_RM.T, strict=True))

    @cached_property
    def _places(self) -> tuple[Ints, Ints, Ints]:
        """First tokens of pairs, and of windows without a gap: the rest is next in the arrays."""
        ends = [(lag, *self.follow(lag)) for lag in (1, SHORT - 1, LONG - 1)]
        at_P, short_P, long_P = (first_P[last_P - first_P == lag] for lag, first_P, last_P in ends)
        return at_P, short_P, long_P

    def _measured(self, order_N: NDArray[np.integer]) -> tuple[float, ...]:
        at_P, short_P, long_P = self._places
        first_N, sets_WN = self.first_N.take(order_N), self.sets_WN.take(order_N, axis=1)
        a_P, b_P = first_N[at_P], first_N[at_P + 1]
        chose_P = (a_P >= 0) & (b_P >= 0)
        shared_P = _size(sets_WN[:, :-1] & sets_WN[:, 1:])[at_P]
        either_N = sets_WN[:, :-1] | sets_WN[:, 1:]
        either_P = _size(either_N)[at_P]
        later_P = _size(sets_WN)[at_P + 1]
        grown_WN, sizes = either_N, []
        for window, starts_P in ((SHORT, short_P), (LONG, long_P)):
            while grown_WN.shape[1] and (width := len(self) - grown_WN.shape[1] + 1) < window:
                grown_WN = grown_WN[:, :-width] | grown_WN[:, width:]
            sizes.append(ratio(_size(grown_WN)[starts_P].sum(), len(starts_P)))
        return (
            ratio((chose_P & (a_P == b_P)).sum(), chose_P.sum()),
            ratio((shared_P > 0).sum(), len(at_P)),
            ratio(shared_P.sum(), later_P.sum()),
            ratio(
                np.divide(shared_P, np.maximum(either_P, 1), dtype=float).sum(),
                (either_P > 0).sum(),
            ),
            *sizes,
        )

    @cached_property
    def halves(self) -> tuple[Floats, Floats, float]:
        """What the first half of a sequence says about its second half.

        Returns:
            `[S, S]`: choices in the second half of the one (column) among the 2 K experts that the
            other's first half (row) chose most, ties to those more popular in the other sequences,
            then to the lower id; `[S]`: the same of the 2 K most popular in the other sequences'
            first halves; and the choices of all second halves. Of sequences of 2 x `PREFIX` tokens
            or more.
        """
        begins_S, of_N, length_S = np.unique(
            self.sequence_N, return_index=True, return_inverse=True, return_counts=True
        )[1:]
        long_S = length_S >= 2 * PREFIX
        first_N = np.arange(len(self)) - begins_S[of_N] < length_S[of_N] // 2
        prefix_SE, suffix_SE = (self._counts(of_N, x_N)[long_S] for x_N in (first_N, ~first_N))
        others_SE = prefix_SE.sum(0) - prefix_SE
        most = 2 * self.ids_NK.shape[1]
        own_SE = _top(prefix_SE * (others_SE.max(initial=0) + 1) + others_SE, most)
        hits_SS = own_SE.astype(float) @ suffix_SE.T.astype(float)
        popular_S = (_top(others_SE, most) * suffix_SE).sum(1).astype(float)
        return hits_SS, popular_S, float(suffix_SE.sum())

    def _counts(self, of_N: Ints, part_N: NDArray[np.bool_]) -> Ints:
        """`[S, E]`: choices of these tokens."""
        rows, ranks = np.nonzero((self.ids_NK >= 0) & part_N[:, None])
        shape = (int(of_N.max(initial=-1)) + 1, self.experts)
        cells = of_N[rows] * self.experts + self.ids_NK[rows, ranks]
        counts = np.bincount(cells, minlength=shape[0] * shape[1])
        return np.asarray(counts.reshape(shape), np.int64)


@lru_cache(maxsize=2)
def orders(tokens: int) -> NDArray[np.int32]:
    """`[R, N]`: so many tokens in other orders; the layers of a stream have them in common."""
    order_RN = np.tile(np.arange(tokens, dtype=np.int32), (FORWARD_DRAWS, 1))
    order_RN = np.random.default_rng(SEED).permuted(order_RN, axis=1)
    order_RN.flags.writeable = False
    return order_RN


def ratio(part: Any, whole: Any) -> float:
    """NaN: of nothing."""
    return float(part / whole) if whole else float("nan")


def _size(sets_WN: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """Experts of each set."""
    out_N = np.zeros(sets_WN.shape[1], np.uint16)
    for word_N in sets_WN:
        out_N += np.bitwise_count(word_N)
    return out_N


def _top(scores_SE: Ints, most: int) -> NDArray[np.bool_]:
    """Those with the largest scores; ties to the lower id."""
    out_SE = np.zeros(scores_SE.shape, bool)
    np.put_along_axis(out_SE, np.argsort(-scores_SE, axis=1, kind="stable")[:, :most], True, 1)
    return out_SE
