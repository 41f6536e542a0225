"""Capacity: what did not fit, what would not fit, and what room stands empty.

An expert takes C = ceil(factor N / E) choices of a capacity group, here a forward of a rank. Who is
dropped depends on the order, how many does not. Four rates of drops are in use, and each is given
its own name: of experts, of choices, of whole tokens, of gate mass.

Legend: ... any leading axes (draws), F forwards, E experts, T tokens, V outputs of the router,
P capacity factors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.metrics.balance import Counts
from moe_lens.metrics.catalogue import metric
from moe_lens.metrics.chance import Chance, Floats, Ints, of_draws, of_forwards_drawn
from moe_lens.metrics.evidence import Answer, Bools

TILE = 128
"""Rows of a tile of a grouped matrix product."""
FEW = 0.01
"""The share of choices whose loss `capacity_for_1` puts up with."""


def overflow(counts_FE: Counts, capacity_F: Counts) -> Any:
    """Share of choices above the capacity, of all forwards together: a ratio of sums."""
    counts = np.asarray(counts_FE)
    over = np.maximum(0, counts - np.asarray(capacity_F)[..., None])
    return over.sum((-1, -2)) / np.maximum(counts.sum((-1, -2)), 1)


def capacity_of(factor: float, choices: Counts, experts: int) -> Counts:
    """C = ceil(factor N / E); rounded before, lest 1.2000000000000002 x 10 make 13."""
    return np.asarray(np.ceil(np.round(factor * np.asarray(choices) / experts, 6)), np.int64)


def dropped_at(counts_FE: Counts, factor: float) -> Any:
    """Share of choices that a capacity factor would drop, each forward being a capacity group."""
    counts = np.asarray(counts_FE)
    return overflow(counts, capacity_of(factor, counts.sum(-1), counts.shape[-1]))


@metric(
    group="capacity",
    formula="mean over forwards of #{experts that overflowed} / E",
    range="0 to 1",
    null="the same of a uniform router at the recorded capacity",
    chance=lambda draws_RFE, capacity_F: of_draws((draws_RFE > capacity_F[:, None]).mean((-1, -2))),
)
def overflowed_experts(overflowed_FE: Counts) -> Any:
    """How widespread overflow is: one hot expert, or all."""
    return (np.asarray(overflowed_FE) > 0).mean((-1, -2))


@metric(
    group="capacity",
    formula="sum max(0, n_i - C) / N",
    range="0 to 1",
    null="the same of a uniform router at the recorded capacity",
    chance=lambda draws_RFE, capacity_F: of_draws(overflow(draws_RFE, capacity_F)),
)
def overflow_rate(dropped_tokens: Answer) -> float | None:
    """Choices that found their expert full, dropped or rerouted.

    Home: the stored question `dropped_tokens`.
    """
    return dropped_tokens["overflow_rate"]


@metric(
    group="capacity",
    formula="choices that no expert computed / N",
    range="0 to overflow_rate",
    null="as overflow_rate, if nothing is rerouted",
    chance=lambda draws_RFE, capacity_F: of_draws(overflow(draws_RFE, capacity_F)),
)
def dropped_rate(dropped_tokens: Answer) -> float | None:
    """Work that was lost. Below overflow_rate where choices are rerouted.

    Home: the stored question `dropped_tokens`.
    """
    return dropped_tokens["dropped_rate"]


@metric(
    group="capacity",
    formula="tokens for which no expert ran / T",
    range="0 to 1",
    null="dropped_rate^k, if a token's choices are dropped independently; they are not, where late "
    "tokens lose",
    chance=lambda dropped_tokens, top_k: Chance((dropped_tokens["dropped_rate"] or 0.0) ** top_k),
)
def unserved_rate(dropped_tokens: Answer) -> float | None:
    """Tokens that pass through on the residual alone.

    Home: the stored question `dropped_tokens`.
    """
    return dropped_tokens["unserved_rate"]


@metric(
    group="capacity",
    formula="sum of gate weights of dropped choices / sum of all",
    range="0 to 1",
    null="the share of dropped choices among the same tokens: weight has no part in it",
    chance=lambda dropped_TV, chosen_TV: Chance(float(dropped_TV.sum() / chosen_TV.sum())),
)
def dropped_gate_mass(weight_TV: Floats, dropped_TV: Bools) -> float:
    # Weights of dropped choices that were recorded as 0 cannot be summed.
    """How much of the layer's output was lost: below the share of choices where the weakest go."""
    if not (weight_TV[dropped_TV] > 0).any():
        return float("nan")
    return float(weight_TV[dropped_TV].sum() / weight_TV.sum())


@metric(
    group="capacity",
    formula="dropped rate in the last tenth of positions / dropped rate of all",
    range="0 to 10 at most, if tokens are spread evenly",
    source="OpenMoE (Xue et al. 2024, arXiv 2402.01739)",
    null="1: position has no part in it",
    chance=lambda: Chance(1.0),
)
def late_drops(ids_NK: Ints, dropped_N: Ints, position_N: Ints) -> float:
    """Drop towards the end: a capacity filled in order of position loses late tokens."""
    end = int(position_N.max()) + 1
    late_N = position_N >= end - end // 10
    if end < 10 or not late_N.any():
        return float("nan")
    choices_N = (ids_NK >= 0).sum(1)
    late = dropped_N[late_N].sum() / max(choices_N[late_N].sum(), 1)
    return float(late / (dropped_N.sum() / choices_N.sum()))


@metric(
    group="capacity",
    formula="1 - sum min(n_i, C) / (E C), of all forwards",
    range="0 to 1",
    null="the same of a uniform router at the recorded capacity",
    drawn=True,
)
def capacity_slack(counts_FE: Counts, capacity_F: Counts) -> Any:
    """Room that stands empty: memory and, with fixed buffers, work for nothing."""
    counts, room = np.asarray(counts_FE), np.asarray(capacity_F)
    used = np.minimum(counts, room[..., None]).sum((-1, -2))
    return 1 - used / (room.sum(-1) * counts.shape[-1])


@metric(
    group="capacity",
    formula=f"sum (ceil(n_i / B) B - n_i) / sum n_i, n_i computed in a forward, B = {TILE}",
    range="0 to B - 1",
    unit="of the rows",
    null="the same of a uniform router, without a capacity",
    chance=lambda draws_RFE: of_draws(padded(draws_RFE, TILE)),
)
def tile_padding(computed_FE: Counts) -> Any:
    """Rows that tiles of a grouped matrix product add: small loads waste most."""
    return padded(computed_FE, TILE)


def padded(counts_FE: Counts, tile: int) -> Any:
    """Rows that tiles add, over rows, of all forwards together."""
    counts = np.asarray(counts_FE)
    return (-counts % tile).sum((-1, -2)) / np.maximum(counts.sum((-1, -2)), 1)


_what_if = partial(
    metric,
    group="capacity",
    range="0 to 1 - factor k/E",
)


@_what_if(
    formula="sum max(0, n_i - C) / N at capacity factor 1",
    null="the same of a uniform router: 1.66 % at E = 64, k = 8, T = 4096",
    chance=lambda draws_RFE: of_draws(dropped_at(draws_RFE, 1.0)),
)
def drop_at_1(sweep: pd.DataFrame) -> float:
    """What capacity factor 1 would drop.

    Home: the stored question `capacity_sweep`.
    """
    return _at(sweep, 1.0)


@_what_if(
    formula="sum max(0, n_i - C) / N at capacity factor 1.25",
    null="the same of a uniform router: 0.12 % at E = 128, k = 1, T = 8192",
    chance=lambda draws_RFE: of_draws(dropped_at(draws_RFE, 1.25)),
)
def drop_at_1_25(sweep: pd.DataFrame) -> float:
    """What capacity factor 1.25 would drop.

    Home: the stored question `capacity_sweep`.
    """
    return _at(sweep, 1.25)


@metric(
    group="capacity",
    formula="the smallest capacity factor of the sweep that drops at most 1 % of choices",
    range="0.5 to 4, in steps of 0.05",
    null="drawn: the same of a uniform router",
    chance=lambda counts_FE, tokens_F, sweep: _of_curves(_smallest, counts_FE, tokens_F, sweep),
)
def capacity_for_1(sweep: pd.DataFrame) -> float:
    """The capacity factor that this routing needs."""
    return smallest(*_columns(sweep))


@metric(
    group="capacity",
    formula="the capacity factor at which the curve of drops lies deepest under its chord",
    range="0.5 to 4, in steps of 0.05",
    source="Satopaa et al. 2011, Finding a Kneedle in a Haystack",
    null="drawn: 1 for a large uniform router: below it drops fall in a straight line",
    chance=lambda counts_FE, tokens_F, sweep: _of_curves(_knees, counts_FE, tokens_F, sweep),
)
def capacity_knee(sweep: pd.DataFrame) -> float:
    """The knee: from here on more capacity buys little."""
    return knee(*_columns(sweep))


def smallest(factor_P: Floats, dropped_P: Floats) -> float:
    """The first factor that drops no more than `FEW`; NaN where none does."""
    enough = np.flatnonzero(np.asarray(dropped_P) <= FEW)
    return float(factor_P[enough[0]]) if len(enough) else float("nan")


def knee(factor_P: Floats, dropped_P: Floats) -> float:
    """Where a falling curve lies deepest under the chord from its first to its last point."""
    x, y = np.asarray(factor_P, float), np.asarray(dropped_P, float)
    if len(x) < 3 or y[0] <= y[-1]:
        return float("nan")
    chord = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return float(x[(chord - y).argmax()])


def _columns(sweep: pd.DataFrame) -> tuple[Floats, Floats]:
    return sweep["capacity_factor"].to_numpy(float), sweep["dropped_share"].to_numpy(float)


def _of_curves(
    function: Callable[..., list[float]], counts_FE: Counts, tokens_F: Ints, sweep: pd.DataFrame
) -> Chance:
    counts, factors = np.asarray(counts_FE), _columns(sweep)[0]
    return of_forwards_drawn(
        function, tokens_F, counts.sum(1), counts.shape[1], tuple(factors.tolist())
    )


def _smallest(draws_RFE: Ints, factors: tuple[float, ...]) -> list[float]:
    return [smallest(np.array(factors), dropped) for dropped in _curves(draws_RFE, factors)]


def _knees(draws_RFE: Ints, factors: tuple[float, ...]) -> list[float]:
    return [knee(np.array(factors), dropped) for dropped in _curves(draws_RFE, factors)]


def _curves(draws_RFE: Ints, factors: tuple[float, ...]) -> Floats:
    """The sweep of each of the first draws, `[R, P]`."""
    some = draws_RFE[:50]  # the curve of a uniform router hardly differs from draw to draw
    return np.stack([dropped_at(some, factor) for factor in factors], -1)


def _at(sweep: pd.DataFrame, factor: float) -> float:
    found = sweep.loc[np.isclose(sweep["capacity_factor"], factor), "dropped_share"]
    return float(found.iloc[0]) if len(found) else float("nan")
