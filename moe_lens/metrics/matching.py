"""Which expert of one run is which of another: matched by the tokens that they serve.

Runs that began from other seeds number their experts otherwise, so that the experts of the same
number have nothing to do with each other. The best assignment finds agreement in anything, tokens
drawn at random included: it is fitted to one half of the sequences, and what is reported is of the
other half, beside what two routers with these loads would share if they knew nothing of each other.

Legend: N tokens, K choices of a token, E experts, S shifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_lens.metrics.chance import SEED, Floats, Ints

SHIFTS = 99
"""Shifts of one run's tokens against the other's: beyond all of them is beyond 1 %."""


@dataclass(frozen=True)
class Matched:
    """How far two runs agree in one layer, on tokens that the matching has not seen.

    Agreement is the mean of |A and B| / k over tokens, k the larger.

    Attributes:
        expert_E: Expert of run b that each of run a stands for.
        tokens: On which agreement was counted.
        before: Agreement of experts of the same number.
        before_by_chance: What independent routers of the same loads would have.
        after: Agreement of matched experts.
        after_by_chance: The same as expected; experts of like load match.
        high: The highest of `SHIFTS` shifts of the tokens, after matching.
    """

    expert_E: Ints
    tokens: int
    before: float
    before_by_chance: float
    after: float
    after_by_chance: float
    high: float

    @property
    def beyond(self) -> bool:
        """Whether matched experts agree more than chance lets them."""
        return self.after > self.high * (1 + 1e-12)


def overlap_counts(a_NK: Ints, b_NK: Ints, experts: int) -> Ints:
    """`[E, E]`: tokens that chose expert i in run a and expert j in run b; -1 is no choice."""
    E = experts
    a, b = (np.where(ids < 0, E, ids) for ids in (a_NK, b_NK))
    cells = a[:, :, None] * (E + 1) + b[:, None, :]
    counts = np.bincount(cells.ravel(), minlength=(E + 1) ** 2).reshape(E + 1, E + 1)
    return np.asarray(counts[:E, :E], np.int64)


def assignment(gain_EE: Floats | Ints) -> Ints:
    """The column of each row that together gain most, each column once.

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987): E^3 steps at
    most, of which numpy does a row at a time.

    Args:
        gain_EE: Square, finite.

    Raises:
        ValueError: It is not.
    """
    cost = -np.asarray(gain_EE, float)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not np.isfinite(cost).all():
        raise ValueError(f"gains are a square of finite numbers; got shape {cost.shape}")
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # of each column; the last column stands for the row to be placed
    for row in range(n):
        row_of[n] = row
        column, came_from = n, np.full(n, n)
        distance, done = np.full(n, np.inf), np.zeros(n + 1, bool)
        while row_of[column] >= 0:
            done[column] = True
            at = row_of[column]
            reduced = cost[at] - row_price[at] - column_price[:n]
            shorter = ~done[:n] & (reduced < distance)
            distance[shorter], came_from[shorter] = reduced[shorter], column
            open_ = np.where(done[:n], np.inf, distance)
            nearest = int(open_.argmin())
            step = open_[nearest]
            row_price[row_of[done]] += step
            column_price[done] -= step
            distance[~done[:n]] -= step
            column = nearest
        while column != n:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    out = np.empty(n, np.int64)
    out[row_of[:n]] = np.arange(n)
    return out


def match(a_NK: Ints, b_NK: Ints, experts: int, sequence_N: Ints) -> Matched | None:
    """Match the experts of a layer on half of its sequences, and see how the other half agrees.

    Args:
        a_NK: Choices of run a; -1: a token chose fewer.
        b_NK: Of run b, of the same tokens.
        experts: E.
        sequence_N: Number of the token's sequence, ascending. Every second one is fitted on; a
            single sequence is cut in its middle.

    Returns:
        None of fewer than four tokens.
    """
    if len(a_NK) < 4:
        return None
    _, nth_N = np.unique(sequence_N, return_inverse=True)
    fitted_N = nth_N % 2 == 0 if nth_N.max() else np.arange(len(nth_N)) < len(nth_N) // 2
    expert_E = assignment(overlap_counts(a_NK[fitted_N], b_NK[fitted_N], experts))
    a_MK, b_MK = a_NK[~fitted_N], b_NK[~fitted_N]
    renamed_MK = np.where(a_MK < 0, -1, expert_E[a_MK])
    size_M = np.maximum(np.maximum((a_MK >= 0).sum(1), (b_MK >= 0).sum(1)), 1)
    rng = np.random.default_rng(SEED)
    shifts_S = rng.integers(1, len(a_MK), SHIFTS)
    in_ME = _members(b_MK, experts)
    shifted = [_agreement(renamed_MK, np.roll(in_ME, s, 0), size_M) for s in shifts_S.tolist()]
    return Matched(
        expert_E=expert_E,
        tokens=len(a_MK),
        before=_agreement(a_MK, in_ME, size_M),
        before_by_chance=_by_chance(a_MK, b_MK, experts, size_M),
        after=_agreement(renamed_MK, in_ME, size_M),
        after_by_chance=_by_chance(renamed_MK, b_MK, experts, size_M),
        high=max(shifted),
    )


def _members(ids_MK: Ints, experts: int) -> Floats:
    """`[M, E + 1]`: 1 where the token chose the expert; the last column, of no choice, is 0."""
    in_ME = np.zeros((len(ids_MK), experts + 1))
    np.put_along_axis(in_ME, np.where(ids_MK < 0, experts, ids_MK), 1.0, 1)
    in_ME[:, experts] = 0
    return in_ME


def _agreement(ids_MK: Ints, in_ME: Floats, size_M: Ints) -> float:
    both_M = np.take_along_axis(in_ME, ids_MK, 1).sum(1)  # -1 is the last column
    return float((both_M / size_M).mean())


def _by_chance(a_MK: Ints, b_MK: Ints, experts: int, size_M: Ints) -> float:
    """Sum over experts of the two shares of tokens, over k."""
    share_a, share_b = (_members(ids, experts).mean(0) for ids in (a_MK, b_MK))
    return float((share_a * share_b).sum() / size_M.mean())
