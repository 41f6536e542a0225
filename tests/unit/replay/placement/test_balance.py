"""Measures of balance against the numbers that were published with their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.balance import balance_of


@pytest.mark.parametrize(
    ("rows_LR", "summed", "mean_over_max"),
    [([[100, 200], [100, 200]], 0.75, 0.75), ([[100, 300], [500, 100], [10, 10]], 0.6296, 0.7556)],
)
def test_the_pair_that_was_once_reduced_over_layers(
    rows_LR: list[list[int]], summed: float, mean_over_max: float
) -> None:
    """vLLM's balancedness before its repair gave 1.0 and 0.425: maxima over layers, not ranks."""
    of = balance_of(np.array([rows_LR]))
    assert of.summed == pytest.approx(summed, abs=5e-5)
    assert of.mean_over_max == pytest.approx(mean_over_max, abs=5e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_against_plain_loops(seed: int, forwards: int, layers: int, ranks: int) -> None:
    random = np.random.default_rng(seed)
    rows_FLR = random.integers(0, 50, (forwards, layers, ranks))
    rows_FLR[random.random((forwards, layers)) < 0.3] = 0  # layers that did not run
    if not rows_FLR.any():
        with pytest.raises(ReplayError):
            balance_of(rows_FLR)
        return
    ratios, shares, evenness, most, mean = [], [], [], 0.0, 0.0
    slowest_of: list[list[int]] = [[] for _ in range(layers)]
    for forward in rows_FLR.tolist():
        slowest = sum(max(of) for of in forward)
        if slowest:
            rows = sum(sum(of) for of in forward)
            shares.append(slowest / rows)
            evenness.append(rows / ranks / slowest)
        for layer, of in enumerate(forward):
            most, mean = most + max(of), mean + sum(of) / ranks
            if sum(of):
                ratios.append(max(of) / (sum(of) / ranks))
                slowest_of[layer].append(of.index(max(of)))
    of = balance_of(rows_FLR)
    assert of.forwards == len(shares)
    assert of.max_over_mean == pytest.approx(np.mean(ratios))
    assert of.excess == pytest.approx(np.mean(ratios) - 1)
    assert of.mean_over_max == pytest.approx(np.mean([1 / r for r in ratios]))
    assert of.critical == pytest.approx(most / mean)
    assert of.summed == pytest.approx(np.mean(evenness))
    found = [of.slowest_p50, of.slowest_p95, of.slowest_p99]
    assert found == pytest.approx([np.percentile(shares, at) for at in (50, 95, 99)])
    same = [max(map(who.count, who)) / len(who) for who in slowest_of if who]
    assert of.hottest == pytest.approx(np.mean(same))


def test_totals_would_have_hidden_it() -> None:
    """Each rank is the slowest once: even on totals, three times an even share in every forward."""
    rows_FLR = 30 * np.eye(3, dtype=int)[:, None]
    assert rows_FLR.sum(0).tolist() == [[30, 30, 30]]
    of = balance_of(rows_FLR)
    assert (of.max_over_mean, of.slowest_p50, of.hottest) == (3, 1, pytest.approx(1 / 3))


@pytest.mark.parametrize(("ranks", "experts", "top_k", "tokens"), [(8, 64, 8, 256), (2, 16, 1, 64)])
def test_what_chance_gives_against_a_fair_router(
    ranks: int, experts: int, top_k: int, tokens: int
) -> None:
    random = np.random.default_rng(0)
    ids = random.random((400, tokens, experts)).argsort(2)[:, :, :top_k]
    rows_FLR = np.stack(
        [np.bincount(of.ravel() * ranks // experts, minlength=ranks)[None] for of in ids]
    )
    of = balance_of(rows_FLR, experts, top_k)
    assert of.by_chance - 1 == pytest.approx(of.max_over_mean - 1, rel=0.05)
    assert np.isnan(balance_of(rows_FLR, experts, None).by_chance)
