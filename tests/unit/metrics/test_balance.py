"""Balance: extremes in closed form, laws, and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import balance
from moe_lens.metrics.catalogue import METRICS, metrics

OF_COUNTS = [m for m in metrics().values() if m.reads == ("counts_E",) and m.group == "balance"]

counts = st.lists(st.integers(0, 500), min_size=2, max_size=40).filter(any).map(np.array)


def collapsed(experts: int, k: int, tokens: int = 1000) -> np.ndarray:
    """Every token chooses the same k experts."""
    return np.array([tokens] * k + [0] * (experts - k))


@pytest.mark.parametrize(("experts", "k", "vio"), [(8, 2, 3), (64, 8, 7), (256, 8, 31)])
def test_collapse(experts: int, k: int, vio: float) -> None:
    n = collapsed(experts, k)
    assert balance.max_vio(n) == pytest.approx(vio)
    assert balance.max_over_mean(n) == pytest.approx(experts / k)
    assert balance.max_share(n) == pytest.approx(1 / k)
    assert balance.min_vio(n) == 1
    assert balance.gini(n) == pytest.approx(1 - k / experts)  # not 1
    assert balance.load_cv(n) == pytest.approx(math.sqrt(experts / k - 1))
    assert balance.jain(n) == pytest.approx(k / experts)
    assert balance.load_entropy(n) == pytest.approx(math.log(k))
    assert balance.effective_experts(n) == pytest.approx(k)
    assert balance.covering_95(n) == math.ceil(round(0.95 * k, 9))
    assert balance.hot_share_10(n) == pytest.approx(min(1, math.ceil(0.1 * experts) / k))


@pytest.mark.parametrize(
    ("experts", "ln"), [(8, 2.079), (32, 3.466), (64, 4.159), (128, 4.852), (256, 5.545)]
)
def test_perfect_balance(experts: int, ln: float) -> None:
    n = np.full(experts, 77)
    assert balance.load_entropy(n) == pytest.approx(ln, abs=5e-4)
    assert balance.effective_experts(n) == pytest.approx(experts)
    for zero in (balance.max_vio, balance.min_vio, balance.load_cv, balance.gini):
        assert zero(n) == pytest.approx(0, abs=1e-9)
    assert balance.jain(n) == pytest.approx(1)
    assert balance.covering_50(n) == experts / 2
    assert balance.hot_share_1(n) == pytest.approx(math.ceil(0.01 * experts) / experts)


def test_entropy_hardly_sees_one_hot_expert() -> None:
    n = np.array([2] + [1] * 63)
    assert balance.load_entropy(n) / math.log(64) > 0.997
    assert balance.max_vio(n) == pytest.approx(2 * 64 / 65 - 1)


@given(counts, st.randoms())
def test_the_order_of_experts_means_nothing(n: np.ndarray, random: object) -> None:
    shuffled = n.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for metric in OF_COUNTS:
        a, b = metric.function(n), metric.function(shuffled)
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12), metric.name


@given(counts)
def test_against_loops(n: np.ndarray) -> None:
    values = [int(x) for x in n]
    total, experts = sum(values), len(values)
    mean = total / experts
    assert balance.max_vio(n) == pytest.approx((max(values) - mean) / mean)
    assert 1 / (1 + balance.max_vio(n)) == pytest.approx(mean / max(values))
    assert balance.min_vio(n) == pytest.approx((mean - min(values)) / mean)
    variance = sum((x - mean) ** 2 for x in values) / experts
    assert balance.load_cv(n) == pytest.approx(math.sqrt(variance) / mean, abs=1e-7)
    assert balance.cv2(n) == pytest.approx(variance / mean**2, abs=1e-12)
    pairs = sum(abs(a - b) for a in values for b in values)
    assert balance.gini(n) == pytest.approx(pairs / (2 * experts * total), abs=1e-12)
    assert balance.jain(n) == pytest.approx(total**2 / (experts * sum(x * x for x in values)))
    entropy = -sum(x / total * math.log(x / total) for x in values if x)
    assert balance.load_entropy(n) == pytest.approx(entropy, abs=1e-12)
    for part in (0.5, 0.8, 0.95):
        taken, left = 0, sorted(values, reverse=True)
        need = 0
        while 100 * taken < round(100 * part) * total:
            taken += left[need]
            need += 1
        assert balance.covering(n, part) == need


@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any), min_size=1))
def test_leading_axes_are_rows(rows: list[list[int]]) -> None:
    for metric in OF_COUNTS:
        each = [float(metric.function(np.array(row))) for row in rows]
        assert metric.function(np.array(rows)) == pytest.approx(each), metric.name


def test_shards_merge_as_counts_and_not_as_ratios() -> None:
    """Pitfalls 4, 5: micro-batches, or ranks, each with a hot expert of its own."""
    shards = np.array([[30, 10, 10, 10], [10, 30, 10, 10], [10, 10, 30, 10], [10, 10, 10, 30]])
    assert balance.max_vio(shards.sum(0)) == pytest.approx(0)
    assert balance.max_vio_batch(shards) == pytest.approx(1)
    uneven = np.array([[90, 10], [1, 0]])
    assert balance.max_vio(uneven.sum(0)) == pytest.approx(91 / 50.5 - 1)
    assert balance.max_vio_batch(uneven) == pytest.approx((0.8 + 1) / 2)


def test_batches_of_a_perfect_router_still_violate() -> None:
    """Pitfall 17: the smaller the batch, the larger MaxVio of chance; runs differ by it alone."""
    from moe_lens.metrics.chance import draws_of

    floors = [balance.max_vio(draws_of(t, 8 * t, 64)).mean() for t in (64, 512, 4096)]
    assert floors[0] > 2.5 * floors[1] > 6 * floors[2]


def test_a_layer_without_choices_has_no_numbers() -> None:
    nothing = np.zeros(4, np.int64)
    for metric in OF_COUNTS:
        assert np.isnan(metric.function(nothing)), metric.name


def test_spearman() -> None:
    a = np.array([10, 20, 30, 40])
    assert balance.spearman(a, a * 3 + 1) == pytest.approx(1)
    assert balance.spearman(a, -a) == pytest.approx(-1)
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)); ranks 1 2 3 4 and 2 1 4 3: d^2 sums to 4.
    assert balance.spearman(a, np.array([2, 1, 4, 3])) == pytest.approx(1 - 6 * 4 / 60)
    # With ties, against Pearson of ranks written out: (1.5, 1.5, 3, 4) and (1, 2, 3, 4).
    x, y = np.array([1.5, 1.5, 3, 4]), np.array([1.0, 2, 3, 4])
    assert balance.spearman(np.array([5, 5, 7, 9]), y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.isnan(balance.spearman(np.ones(4), a))


def test_the_null_of_stability_is_that_of_permutations() -> None:
    rng = np.random.default_rng(0)
    a = np.arange(64)
    drawn = np.array([balance.spearman(a, rng.permutation(64)) for _ in range(2000)])
    chance = METRICS["popularity_stability"].chance
    assert chance is not None
    limit = chance(experts=64).high
    assert drawn.std() == pytest.approx(1 / math.sqrt(63), rel=0.06)
    assert (np.abs(drawn) > limit).mean() < 0.004


@pytest.mark.parametrize(("experts", "tokens"), [(64, 83), (128, 183), (256, 393)])
def test_what_is_called_dead_needs_a_window(experts: int, tokens: int) -> None:
    """With one expert in a thousand routers missed by chance: ln(E / 0.001) / -ln(1 - k/E)."""
    chance = METRICS["dead_experts"].chance
    assert chance is not None
    enough = chance(experts=experts, counts_E=np.array([tokens * 8]), tokens=tokens)
    short = chance(experts=experts, counts_E=np.array([(tokens - 5) * 8]), tokens=tokens - 5)
    assert enough.expected < 1.001e-3 < short.expected
    assert enough.beyond(1) == "high"
