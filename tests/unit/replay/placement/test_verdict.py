"""The verdict against what is known of the routing it judges."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.counts import Counts
from moe_lens.replay.placement.fit import Group, placed
from moe_lens.replay.placement.verdict import fetched, verdict_of
from moe_lens.trace import synthetic
from tests.support.placements import counted

GROUP = Group(8, 16)
ALONE = Group(8)
"""No replicas: which of equally likely experts are doubled does gain a little."""
FORWARDS = {"stationary": 128, "drifting": 512, "bursty": 256, "balanced": 128}
"""Where popularity moves, a window must hold enough of it to say so."""


@functools.cache
def counts_of(kind: str, seed: int) -> Counts:
    spec = getattr(synthetic, kind)(steps=FORWARDS[kind], seed=seed, layers=3, groups=8)
    return counted(synthetic.counts(spec))


def oracle(kind: str) -> str:
    """A plan helps where the future is skewed as the past was, and only there.

    Balanced: no placement is better. Drifting and bursty: the next forwards' popular experts are
    drawn independently of all before, so that to the plan all experts are alike.
    """
    return "helps" if kind == "stationary" else "does not help"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", list(FORWARDS))
@pytest.mark.parametrize("method", ["lpt", "eplb"])
def test_it_says_what_an_oracle_would(kind: str, method: str, seed: int) -> None:
    counts = counts_of(kind, seed)
    now = placed("contiguous", Group(8), counts)
    of = verdict_of(counts, method, ALONE, now)
    assert of.says == oracle(kind), of.why
    assert of.low < of.gain < of.high


@pytest.mark.parametrize("seed", range(4))
def test_the_gain_is_what_the_true_rates_give(seed: int) -> None:
    """Stationary routing of many tokens: rank loads follow the rates, the best plan is even."""
    spec = replace(synthetic.stationary(steps=64, seed=seed, layers=2), length=256)
    counts_FLE = synthetic.counts(spec)
    rate_LE = counts_FLE.mean(0)
    slowest_L = rate_LE.reshape(2, 8, 8).sum(2).max(1)
    counts = counted(counts_FLE)
    of = verdict_of(counts, "lpt", GROUP, placed("contiguous", Group(8), counts))
    assert of.gain == pytest.approx(1 - rate_LE.sum() / 8 / slowest_L.sum(), abs=0.03)


def test_a_plan_on_its_own_forwards_flatters_where_experts_burst() -> None:
    counts = counted(synthetic.counts(synthetic.bursty(layers=2)))
    of = verdict_of(counts, "eplb", GROUP, placed("contiguous", Group(8), counts))
    assert of.fitted_gain > 0.1 > of.gain


def test_little_is_not_enough() -> None:
    spec = synthetic.stationary(steps=31, layers=1, sequences=2)
    counts = counted(synthetic.counts(spec))
    now = placed("contiguous", Group(8), counts)
    few = verdict_of(counts, "eplb", GROUP, now)
    assert (few.says, few.gains) == ("not enough evidence", [])
    assert "31 forwards are too few: 32" in few.why
    three = verdict_of(counts.at([0, 1, 2]), "eplb", GROUP, now)
    assert three.says == "not enough evidence"
    idle = counted(np.zeros((64, 1, 64)))
    assert verdict_of(idle, "eplb", GROUP, now).says == "not enough evidence"


def test_the_interval_decides_near_the_bound() -> None:
    spec = synthetic.stationary(steps=128, layers=1, sequences=2, length=16)
    counts = counted(synthetic.counts(spec))
    now = placed("contiguous", Group(8), counts)
    of = verdict_of(counts, "eplb", GROUP, now)
    assert of.low > 0.05
    assert len(of.gains) == 15
    half = 1.761 * statistics.stdev(of.gains) / math.sqrt(15)  # t of 14 degrees of freedom
    assert (of.low, of.high) == pytest.approx((of.gain - half, of.gain + half))
    assert verdict_of(counts, "eplb", GROUP, now, least_gain=of.gain).says == "not enough evidence"
    above = (of.high + 1) / 2
    assert verdict_of(counts, "eplb", GROUP, now, least_gain=above).says == "does not help"
    with pytest.raises(ReplayError, match="share"):
        verdict_of(counts, "eplb", GROUP, now, least_gain=1.0)


def test_what_has_to_be_fetched() -> None:
    weights_FLE = np.ones((1, 1, 4))
    a = placed("contiguous", Group(2), counted(weights_FLE))
    b = replace(a, slots_LP=np.array([[0, 2, 3, 1, 2, 3]], np.int32))
    assert fetched(a, b).tolist() == [[2], [1]]  # rank 0 lacks 2 and 3, rank 1 lacks 1
    assert fetched(b, a).tolist() == [[1], [0]]
    with pytest.raises(ReplayError, match="different"):
        fetched(a, placed("contiguous", Group(4), counted(weights_FLE)))


def test_what_makes_it_worse_is_said() -> None:
    counts = counts_of("stationary", 0)
    now = placed("lpt", ALONE, counts)
    of = verdict_of(counts, "contiguous", ALONE, now)
    assert of.says == "does not help"
    assert "more rows" in of.why
    assert of.why.endswith("it makes it worse.")
