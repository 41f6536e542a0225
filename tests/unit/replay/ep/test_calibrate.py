"""A line through timings, its errors, and the traffic that it is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import ReplayError
from moe_lens.replay.ep import calibrate
from moe_lens.replay.ep.all_to_all import busiest, link_of
from moe_lens.replay.ep.calibrate import Errors, Fit

LOADS = [2**12 * 4**i for i in range(7)]


@given(st.floats(1e-7, 1e-2), st.floats(1e8, 1e12))
def test_a_line_is_found_again(latency_s: float, bytes_per_s: float) -> None:
    taken = [latency_s + n / bytes_per_s for n in LOADS]
    found = calibrate.line(LOADS, taken)
    said = [found[0] + n / found[1] for n in LOADS]
    assert calibrate.errors(said, taken).worst < 1e-6


def test_errors_count_alike_however_large_the_all_to_all() -> None:
    # No other latency and bandwidth have smaller relative errors in sum of squares.
    g = np.random.default_rng(0)
    taken = [(1e-4 + n / 1e9) * g.uniform(0.7, 1.4) for n in LOADS]

    def loss(latency: float, rate: float) -> float:
        return float(
            sum(((latency + n / rate - t) / t) ** 2 for n, t in zip(LOADS, taken, strict=True))
        )

    latency, rate = calibrate.line(LOADS, taken)
    least = loss(latency, rate)
    for a in (0.95, 1, 1.05):
        for b in (0.95, 1, 1.05):
            assert loss(a * latency, b * rate) >= least * (1 - 1e-12)


def test_no_latency_below_zero_and_no_bandwidth_from_noise() -> None:
    latency, rate = calibrate.line([1, 10, 100], [1e-6, 2e-5, 4e-4])
    assert latency == 0
    assert rate > 0
    with pytest.raises(ReplayError, match="no bandwidth can be told"):
        calibrate.line([1, 10, 100], [1.0, 0.5, 0.1])


def test_errors() -> None:
    found = calibrate.errors([1.0, 2.0, 3.0], [1.0, 4.0, 2.0])
    assert found == Errors(3, 0.5, 0.5)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_traffic(ranks: int) -> None:
    flat = calibrate.balanced(ranks, 7 * 8 * 100)
    assert len(set(flat.sum(axis=0)) | set(flat.sum(axis=1))) == 1
    assert np.diag(flat).sum() == 0
    hot = calibrate.one_hot(ranks, 700)
    assert busiest(hot) == hot.sum() == hot[:, 0].sum() == 700 // (ranks - 1) * (ranks - 1)
    skew = calibrate.zipf(ranks, 10_000).sum(axis=0)
    assert (np.diff(skew[1:]) < 0).all()
    assert np.diag(calibrate.zipf(ranks, 10_000)).sum() == 0


def test_what_is_kept_is_found_by_a_replay_of_as_many_ranks(cache: Path) -> None:
    fit = Fit(
        "A GPU", 4, "nccl", 2e-5, 1e11, Errors(9, 0.1, 0.2), Errors(4, 0.3, 0.4), 2**28, "n", {}, 1
    )
    path = calibrate.keep(fit)
    assert path.is_relative_to(cache)
    kept = json.loads(path.read_text())
    assert kept["skewed"] == {"count": 4, "median": 0.3, "worst": 0.4}
    link = link_of(None, device_name="A GPU", ranks=4, nodes=1)
    assert (link.latency_s, link.bytes_per_s, link.label) == (2e-5, 1e11, "nccl")
