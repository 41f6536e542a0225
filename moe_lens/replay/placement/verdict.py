"""Whether a placement would have helped: fitted on one part of a run, judged on the next.

The run is cut into windows of equally many forwards. A plan is fitted on each and judged on the one
after it, as an engine that rearranges its experts would use it, beside the experts where they lie
now. Its gain is the share of the slowest ranks' rows that it saves. What a plan scores on the
forwards it was fitted to says nothing: there every plan looks good.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.balance import rank_rows
from moe_lens.replay.placement.counts import Counts
from moe_lens.replay.placement.fit import Group, placed
from moe_lens.replay.placement.plan import Placement

LEAST_GAIN = 0.05
"""Share of the slowest ranks' rows that is worth a rearrangement, if nobody says."""

WINDOWS = 17
"""Into which a run is cut at most: sixteen pairs to judge by."""

_LEAST_FORWARDS = 8
"""Of a window: fewer say more of chance than of the routing."""

_LEAST_PAIRS = 3

# fmt: off
_T_95 = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812,
    1.796, 1.782, 1.771, 1.761, 1.753,
)
# fmt: on
"""95 % quantiles of Student's t, from 1 degree of freedom on (any table of it)."""


@dataclass(frozen=True)
class Verdict:
    """What came of it.

    Attributes:
        says: "helps", "does not help" or "not enough evidence".
        why: In a sentence.
        gains: 1 - (rows of the slowest ranks, placed) / (the same, as it is), by window judged.
        gain: Their mean; NaN without windows.
        low, high: One-sided 95 % bounds of the mean gain, by Student's t over the windows. Windows
            that are like their neighbours count for fewer (the first autocorrelation of the gains).
            Where windows are independent, to be told "helps" where nothing is gained has a chance
            of about 1 in 20; where popularity drifts over the whole run it can be several times
            that.
        fitted_gain: Mean gain on the very forwards that plans were fitted to: what an answer
            without a holdout would have promised.
        forwards: In each window.
        moved: Mean experts that a rank has to fetch, over all layers, when the plan of a window
            follows that of the window before; the most of any rank.
        first_moved: The same for the first plan, from where experts lie now.
    """

    says: str
    why: str
    gains: list[float]
    gain: float
    low: float
    high: float
    fitted_gain: float
    forwards: int
    moved: float
    first_moved: float


def verdict_of(
    counts: Counts,
    method: str,
    group: Group,
    now: Placement,
    *,
    together_LEE: NDArray[np.float64] | None = None,
    least_gain: float = LEAST_GAIN,
) -> Verdict:
    """Judge a way to place experts.

    Args:
        counts: Of the run's forwards, in time.
        method: One of `methods.METHODS`.
        group: Ranks, replicas, nodes.
        now: Where experts lie.
        together_LEE: For "affinity".
        least_gain: Share below which a gain is none.

    Raises:
        ReplayError: Numbers that do not divide, or a share outside 0 to 1.
    """
    if not 0 <= least_gain < 1:
        raise ReplayError(f"the least gain is a share from 0 to below 1, got {least_gain:g}.")
    forwards = len(counts.forwards)
    windows = min(WINDOWS, forwards // _LEAST_FORWARDS)
    if windows - 1 < _LEAST_PAIRS:
        need = (_LEAST_PAIRS + 1) * _LEAST_FORWARDS
        return _unknown(f"{forwards:,} forwards are too few: {need} are needed at least.")
    size = forwards // windows
    begin = forwards - windows * size  # the oldest are left over
    starts = range(begin, forwards, size)
    parts = [counts.at(list(range(start, start + size))) for start in starts]
    plans = [placed(method, group, part, together_LEE) for part in parts]
    before = [_slowest(part, now) for part in parts]
    pairs = [(i, i + 1) for i in range(windows - 1) if before[i + 1]]
    if len(pairs) < _LEAST_PAIRS:
        return _unknown("experts computed something in too few of the windows.")
    gains = [1 - _slowest(parts[j], plans[i]) / before[j] for i, j in pairs]
    own = [i for i in range(windows) if before[i]]
    fitted = [1 - _slowest(parts[i], plans[i]) / before[i] for i in own]
    mean = float(np.mean(gains))
    low, high = mean - _error(gains), mean + _error(gains)
    moves = [fetched(a, b).sum(1).max() for a, b in itertools.pairwise(plans)]
    says, why = _says(mean, low, high, least_gain, len(gains))
    return Verdict(
        says=says,
        why=why,
        gains=gains,
        gain=mean,
        low=low,
        high=high,
        fitted_gain=float(np.mean(fitted)),
        forwards=size,
        moved=float(np.mean(moves)),
        first_moved=float(fetched(now, plans[0]).sum(1).max()),
    )


def _error(gains: list[float]) -> float:
    """How far the mean may be off, one-sided 95 %."""
    apart = np.array(gains) - np.mean(gains)
    total = float(apart @ apart)
    alike = max(0.0, float(apart[1:] @ apart[:-1]) / total) if total else 0.0
    worth = max(2, int(len(gains) * (1 - alike) / (1 + alike)))  # independent windows
    return _T_95[worth - 2] * float(np.std(gains, ddof=1)) / math.sqrt(worth)


def _slowest(counts: Counts, placement: Placement) -> int:
    """Rows of the slowest rank of each layer in each forward, summed."""
    return int(rank_rows(counts, placement).max(2).sum())


def fetched(old: Placement, new: Placement) -> NDArray[np.int64]:
    """Experts that each rank has to fetch in each layer [R, L]: it has none of their slots yet.

    Raises:
        ReplayError: The two are of different models.
    """
    if (old.ranks, old.experts, old.layers) != (new.ranks, new.experts, new.layers):
        raise ReplayError("the two placements are of different models or numbers of ranks.")
    return np.stack([(_held(new, r) & ~_held(old, r)).sum(1) for r in range(new.ranks)])


def _held(plan: Placement, rank: int) -> NDArray[np.bool_]:
    """Experts of which a rank has a slot [L, E]."""
    per = plan.slots_per_rank
    held_LE = np.zeros((len(plan.layers), plan.experts), bool)
    slots_LS = plan.slots_LP[:, rank * per : (rank + 1) * per].astype(np.int64)
    np.put_along_axis(held_LE, slots_LS, True, axis=1)
    return held_LE


def _says(mean: float, low: float, high: float, least: float, windows: int) -> tuple[str, str]:
    word = "fewer" if mean >= 0 else "more"
    of = f"{_percent(abs(mean))} {word} rows on the slowest ranks (gain {_percent(low)} to "
    of += f"{_percent(high)}, from {windows} windows)"
    if low > least:
        return "helps", f"{of}: more than the {_percent(least)} asked for."
    if high < 0:
        return "does not help", f"{of}: it makes it worse."
    if high < least:
        return "does not help", f"{of}: less than the {_percent(least)} asked for."
    return (
        "not enough evidence",
        f"{of}: it may be more or less than the {_percent(least)} asked for.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _unknown(why: str) -> Verdict:
    nan = math.nan
    return Verdict("not enough evidence", why, [], nan, nan, nan, nan, 0, nan, nan)
