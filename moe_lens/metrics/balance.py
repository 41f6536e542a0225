"""How evenly a layer's choices fall on its experts.

From counts of valid tokens: sums that merge over ranks and windows before any ratio is taken.
f_i = n_i / N is the share of choices (sum 1); F_i = n_i / T the share of tokens (sum k); the mean
load is mu = N / E = T k / E.

Legend: ... any leading axes (draws), H halves of the run, F forwards, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Chance, Floats, of_draws
from moe_lens.metrics.evidence import Answer

Counts = NDArray[Any]

_WANG = "Wang et al. 2024, arXiv 2408.15664, eq. 4"


def shares(counts_E: Counts) -> Floats:
    """f_i, `[..., E]`; NaN where nothing was chosen."""
    counts = np.asarray(counts_E, float)
    total = counts.sum(-1, keepdims=True)
    return np.asarray(np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0))


def entropy(share_E: Floats) -> Any:
    """-sum f ln f over the last axis, nats; 0 ln 0 = 0."""
    logs = np.log(np.where(share_E > 0, share_E, 1.0))
    return -(share_E * logs).sum(-1)


def cv2(load_E: Counts) -> Any:
    """Squared coefficient of variation over the last axis: variance of the population / mean^2."""
    return (shares(load_E) ** 2).sum(-1) * np.shape(load_E)[-1] - 1


@metric(
    group="balance",
    formula="max f_i",
    range="1/E to 1/k",
    null="(1 + MaxVio of chance) / E",
    drawn=True,
)
def max_share(counts_E: Counts) -> Any:
    """One expert takes more than its part: the one that a rank waits for."""
    return shares(counts_E).max(-1)


@metric(
    group="balance",
    formula="max n_i / mu",
    range="1 to E/k",
    null="about 1 + sqrt(2 ln E (1 - k/E) / mu), a little less",
    drawn=True,
)
def max_over_mean(counts_E: Counts) -> Any:
    """How much longer the hottest expert works than the mean."""
    return shares(counts_E).max(-1) * np.shape(counts_E)[-1]


@metric(
    group="balance",
    formula="(max n_i - mu) / mu",
    range="0 to E/k - 1",
    source=_WANG,
    null="about sqrt(2 ln E (1 - k/E) / mu), a little less",
    drawn=True,
)
def max_vio(counts_E: Counts) -> Any:
    """Global imbalance: the hottest expert over the whole phase."""
    return max_over_mean(counts_E) - 1


@metric(
    group="balance",
    formula="mean over forwards of (max n_i - mu) / mu",
    range="0 to E/k - 1",
    source=f"{_WANG} (batch)",
    null="as max_vio, with the tokens of one forward",
    drawn=True,
)
def max_vio_batch(counts_FE: Counts) -> Any:
    """Imbalance of a batch, what a step waits for.

    It grows as batches shrink: compare runs of one batch size only.
    """
    return np.nanmean(max_vio(counts_FE), -1)


@metric(
    group="balance",
    formula="(mu - min n_i) / mu",
    range="0 to 1",
    source=_WANG,
    null="as max_vio, never above 1",
    drawn=True,
)
def min_vio(counts_E: Counts) -> Any:
    """The coldest expert: 1 means that it is never chosen."""
    return 1 - shares(counts_E).min(-1) * np.shape(counts_E)[-1]


@metric(
    group="balance",
    formula="-sum f_i ln f_i",
    range="0 to ln E",
    unit="nats",
    null="ln E - (1 - k/E) / (2 mu)",
    drawn=True,
)
def load_entropy(counts_E: Counts) -> Any:
    """Collapse onto few experts. Insensitive: one expert with twice its load hardly moves it."""
    return entropy(shares(counts_E))


@metric(
    group="balance",
    formula="exp(load entropy)",
    range="1 to E",
    unit="experts",
    null="E exp(-(1 - k/E) / (2 mu))",
    drawn=True,
)
def effective_experts(counts_E: Counts) -> Any:
    """As many experts, evenly used, would have this entropy."""
    return np.exp(load_entropy(counts_E))


@metric(
    group="balance",
    formula="sd(n_i) / mu, of the population",
    range="0 to sqrt(E/k - 1)",
    null="sqrt((1 - k/E) / mu)",
    drawn=True,
)
def load_cv(counts_E: Counts) -> Any:
    """Overall unevenness; weighs all experts, not the hottest alone."""
    return np.sqrt(np.maximum(cv2(counts_E), 0))


@metric(
    group="balance",
    formula="sum (2 i - E - 1) n_(i) / (E N), n_(1) the smallest",
    range="0 to 1 - k/E",
    null="about CV / sqrt(pi)",
    drawn=True,
)
def gini(counts_E: Counts) -> Any:
    """Overall unevenness, by ranks. Not up to 1: a token takes k different experts."""
    ordered = np.sort(shares(counts_E), -1)
    experts = ordered.shape[-1]
    return (ordered * (2 * np.arange(1, experts + 1) - experts - 1)).sum(-1) / experts


@metric(
    group="balance",
    formula="N^2 / (E sum n_i^2) = 1 / (1 + CV^2)",
    range="k/E to 1",
    source="Jain, Chiu, Hawe 1984, DEC-TR-301",
    null="1 / (1 + (1 - k/E) / mu)",
    drawn=True,
)
def jain(counts_E: Counts) -> Any:
    """Share of experts that would do the same work if evenly used."""
    return 1 / (1 + cv2(counts_E))


def _dead_by_chance(experts: int, counts_E: Counts, tokens: int) -> Chance:
    missed = (1 - counts_E.sum() / tokens / experts) ** tokens
    # The question answers only where missing any expert by chance is rarer than 0.1 %.
    return Chance(float(experts * missed), 0.0, 0.0)


@metric(
    group="balance",
    formula="#{n_i = 0}, asked only when T >= ln(E / 0.001) / -ln(1 - k/E)",
    range="0 to E",
    unit="experts",
    null="E (1 - k/E)^T: below 0.001 wherever it is answered",
    chance=_dead_by_chance,
)
def dead_experts(layer_balance: Answer) -> float | None:
    """Experts that nobody chooses: parameters that do nothing.

    Home: the stored question `layer_balance`.
    """
    return layer_balance["dead_experts"]


def _dormant_by_chance(draws_RE: Counts) -> Chance:
    return of_draws((shares(draws_RE) * draws_RE.shape[-1] < 0.1).sum(-1))


@metric(
    group="balance",
    formula="#{n_i < 0.1 mu}, dead ones included, asked as dead_experts",
    range="0 to E",
    unit="experts",
    null="the same count of a uniform router",
    chance=_dormant_by_chance,
)
def dormant_experts(layer_balance: Answer) -> float | None:
    """Experts that are hardly chosen.

    Home: the stored question `layer_balance`.
    """
    return layer_balance["dormant_experts"]


def hot_share(counts_E: Counts, part: float) -> Any:
    """Share of choices that the ceil(part E) hottest experts take, over the last axis."""
    ordered = -np.sort(-shares(counts_E), -1)
    return ordered[..., : _experts_of(part, ordered.shape[-1])].sum(-1)


def covering(counts_E: Counts, part: float) -> Any:
    """The fewest experts that together take this part of the choices, over the last axis."""
    ordered = -np.sort(-np.asarray(counts_E), -1)
    reached, total = np.cumsum(ordered, -1), ordered.sum(-1, keepdims=True)
    # In whole choices: 0.95 N is a hair above a whole number in floating point.
    enough = reached * 100 >= round(part * 100) * total
    return np.where(total[..., 0] > 0, enough.argmax(-1) + 1, np.nan)


def _experts_of(part: float, experts: int) -> int:
    return max(1, int(np.ceil(round(part * experts, 9))))


_hot = partial(
    metric,
    group="balance",
    range="the part (whole experts) to 1",
    null="the same share of a uniform router; above the part, since the hottest are picked",
    drawn=True,
)


@_hot(formula="share of choices of the ceil(0.01 E) hottest experts")
def hot_share_1(counts_E: Counts) -> Any:
    """What the hottest 1 % of experts do: one end of the Lorenz curve."""
    return hot_share(counts_E, 0.01)


@_hot(formula="share of choices of the ceil(0.05 E) hottest experts")
def hot_share_5(counts_E: Counts) -> Any:
    """What the hottest 5 % of experts do."""
    return hot_share(counts_E, 0.05)


@_hot(formula="share of choices of the ceil(0.10 E) hottest experts")
def hot_share_10(counts_E: Counts) -> Any:
    """What the hottest 10 % of experts do."""
    return hot_share(counts_E, 0.10)


_cover = partial(
    metric,
    group="balance",
    range="1 to E",
    unit="experts",
    null="the same count of a uniform router, a little below that part of E",
    drawn=True,
)


@_cover(formula="fewest experts with 50 % of choices")
def covering_50(counts_E: Counts) -> Any:
    """Size of the committee that does half of the work."""
    return covering(counts_E, 0.50)


@_cover(formula="fewest experts with 80 % of choices")
def covering_80(counts_E: Counts) -> Any:
    """Size of the committee that does four fifths of the work."""
    return covering(counts_E, 0.80)


@_cover(formula="fewest experts with 95 % of choices")
def covering_95(counts_E: Counts) -> Any:
    """Size of the committee that does nearly all work: what would have to be resident."""
    return covering(counts_E, 0.95)


def spearman(a_E: Counts, b_E: Counts) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is all ties."""
    a, b = (_ranks(np.asarray(x)) for x in (a_E, b_E))
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / spread) if spread > 0 else float("nan")


def _ranks(x: Counts) -> Floats:
    _, place, times = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    return np.asarray((last - (times - 1) / 2)[place], float)


def _no_relation(experts: int) -> Chance:
    # The variance of Spearman's rho over all permutations is 1 / (E - 1), exactly.
    limit = min(1.0, 3.29 / np.sqrt(max(experts - 1, 1)))
    return Chance(0.0, -limit, limit)


@metric(
    group="balance",
    formula="Spearman correlation of n_i between the first and the second half of the steps",
    range="-1 to 1",
    null="0 +- 3.29 / sqrt(E - 1): order is forgotten (99.9 %, normal approximation)",
    chance=_no_relation,
)
def popularity_stability(counts_HE: Counts) -> float:
    """Whether popularity can be foretold: a placement fitted to the past needs it."""
    return spearman(counts_HE[0], counts_HE[1])
