"""Expected probabilities against closed forms, all orders one by one, and what is drawn."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.trace.synthetic import (
    Burst,
    Committee,
    Dead,
    Drift,
    Hot,
    Pair,
    Spec,
    Specialist,
    counts,
    everything,
)
from moe_lens.trace.synthetic.expected import expected, inclusion
from moe_lens.trace.synthetic.router import Routers

scores = st.lists(st.floats(-6, 6), min_size=2, max_size=6)


def by_all_orders(score: list[float], k: int) -> np.ndarray:
    """Drawing one after the other without replacement, each order of k by itself."""
    weight = np.exp(score)
    out = np.zeros(len(score))
    for order in permutations(range(len(score)), k):
        p, left = 1.0, weight.sum()
        for e in order:
            p *= weight[e] / left
            left -= weight[e]
        out[list(order)] += p
    return out


@given(scores, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_inclusion_is_the_sum_over_all_orders(score: list[float], k: int) -> None:
    k = min(k, len(score))
    found = inclusion(np.array([score]), k)[0]
    assert found == pytest.approx(by_all_orders(score, k), abs=1e-9)
    assert found.sum() == pytest.approx(k)


def test_inclusion_closed_forms() -> None:
    score = np.random.default_rng(0).normal(0, 3, (1, 128))
    softmax = np.exp(score) / np.exp(score).sum()
    assert inclusion(score, 1) == pytest.approx(softmax, abs=1e-12)
    assert inclusion(np.zeros((1, 64)), 8) == pytest.approx(np.full((1, 64), 1 / 8))
    assert (inclusion(score, 0) == 0).all()
    assert (inclusion(score, 128) == 1).all()
    far = inclusion(np.array([[300.0, 0.0, 0.0, -300.0]]), 2)
    assert far == pytest.approx(np.array([[1.0, 0.5, 0.5, 0.0]]), abs=1e-9)


PLANTED = (
    Hot(0, share=0.8),
    Dead(1),
    Pair(2, 3, together=0.9),
    Committee((4, 5, 6), share=0.3),
    Specialist(7, "maths", lift=3.0),
)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(steps=64, popularity="zipf"),
        Spec(steps=64, popularity="lognormal", skew=(0.5, 1.5)),
        Spec(steps=64, experts=32, top_k=8, popularity="zipf", planted=PLANTED),
        Spec(steps=64, experts=32, top_k=8, burst=Burst(0.9, every=100)),
        Spec(steps=64, top_k=16),
        Spec(steps=64, popularity="zipf", context_independence=0.5),
        Spec(steps=64, popularity="zipf", context_independence=1.0),
    ],
    ids=["zipf", "lognormal", "planted", "burst", "all", "half", "lookup"],
)
def test_what_is_drawn_is_what_is_expected(spec: Spec) -> None:
    later = 1 if spec.burst else 0  # forward 0 has the burst, the others do not
    want = expected(Routers(spec), later)
    counts_FLE = counts(spec)[later:]
    n = len(counts_FLE) * spec.sequences * spec.length
    found = counts_FLE.sum(0) / n
    # Token ids repeat, so with them fewer draws are independent.
    room = 5 * np.sqrt(0.25 / n) if want.exact else 0.03
    assert want.exact == (spec.context_independence == 0)
    assert np.abs(found - want.prob_LE).max() < room
    assert want.prob_LE.sum(1) == pytest.approx(np.full(spec.layers, spec.top_k))
    assert want.prob_LGE.sum(2) == pytest.approx(np.full((spec.layers, 4), spec.top_k))


def test_domains_and_topics_are_averaged_exactly() -> None:
    spec = everything(steps=200, sequences=40, length=32)
    want = expected(Routers(spec), 0)
    assert want.exact
    found = counts(spec).sum(0) / (200 * 40 * 32)
    assert np.abs(found - want.prob_LE).max() < 0.01  # topics stay: few draws are independent


def test_planted_experts_have_what_was_stated() -> None:
    spec = Spec(experts=32, top_k=8, popularity="zipf", domain_strength=1.0, planted=PLANTED)
    want = expected(Routers(spec), 0)
    assert want.prob_LE[:, 0] == pytest.approx([0.8, 0.8])
    assert want.prob_LE[:, 1] == pytest.approx([0, 0], abs=1e-15)
    assert want.prob_LE[:, [2, 3, 7]] == pytest.approx(np.full((2, 3), 0.25))
    assert want.prob_LGE[:, :, 4:7].sum(2) == pytest.approx(np.full((2, 4), 2.4))
    maths = list(spec.shares).index("maths")
    assert want.prob_LGE[:, maths, 7] == pytest.approx([0.75, 0.75])


def test_expected_follows_drift_and_bursts() -> None:
    routers = Routers(Spec(popularity="zipf", drift=Drift((4,))))
    before, same, after = (expected(routers, f).prob_LE for f in (0, 3, 4))
    assert (before == same).all()
    assert not np.allclose(before, after)
    assert np.sort(before) == pytest.approx(np.sort(after))
    routers = Routers(Spec(burst=Burst(0.9)))
    first, second = (expected(routers, f).prob_LE[0] for f in (0, 1))
    assert first.max() == pytest.approx(0.9)
    assert first.argmax() != second.argmax()
    assert np.sort(first)[:-1] == pytest.approx(np.full(15, 1.1 / 15))
