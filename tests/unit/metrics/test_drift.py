"""Distances of shares and their sampling floors, design effects, and where a run changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import drift
from moe_lens.metrics.chance import uniform_counts

counts = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.integers(0, 50), min_size=n, max_size=n).filter(any) for _ in range(2))
    )
)


def naive_jsd(a: list[int], b: list[int]) -> float:
    p, q = ([x / sum(side) for x in side] for side in (a, b))
    total = 0.0
    for x, y in zip(p, q, strict=True):
        middle = (x + y) / 2
        total += sum(s / 2 * math.log(s / middle) for s in (x, y) if s)
    return total


@given(counts)
def test_distances_are_those_of_a_plain_loop(both: tuple[list[int], list[int]]) -> None:
    a, b = both
    p, q = ([x / sum(side) for x in side] for side in both)
    assert drift.jsd(a, b) == pytest.approx(naive_jsd(a, b), abs=1e-12)
    assert drift.jsd(a, b) == pytest.approx(drift.jsd(p, q), abs=1e-12)  # scale has no part
    assert drift.jsd(a, b) == pytest.approx(drift.jsd(b, a), abs=1e-12)
    assert 0 <= drift.jsd(a, b) <= math.log(2) + 1e-12
    assert drift.total_variation(a, b) == pytest.approx(
        sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    )
    assert drift.jsd(a[::-1], b[::-1]) == pytest.approx(drift.jsd(a, b), abs=1e-12)


@given(counts)
def test_tests_of_tables_are_those_of_a_plain_loop(both: tuple[list[int], list[int]]) -> None:
    a, b = both
    chi, g, total = 0.0, 0.0, sum(a) + sum(b)
    for side in both:
        for n, x, y in zip(side, a, b, strict=True):
            due = sum(side) * (x + y) / total
            if due:
                chi += (n - due) ** 2 / due
                g += 2 * n * math.log(n / due) if n else 0.0
    assert drift.chi_square(np.array(a), np.array(b)) == pytest.approx(chi, abs=1e-9)
    assert drift.g_test(np.array(a), np.array(b)) == pytest.approx(g, abs=1e-9)


def test_psi() -> None:
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    wanted = sum((x - y) * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert drift.psi(p, q) == pytest.approx(wanted)
    assert drift.psi([500, 300, 200], [2000, 3000, 5000]) == pytest.approx(wanted)
    assert drift.psi([0.5, 0.5], [1.0, 0.0]) == math.inf
    half = drift.psi([100, 100], [200, 0])  # half a choice stands for none
    assert half == pytest.approx(drift.psi([100, 100], [200, 0.5]))
    assert np.isfinite(half)
    assert drift.psi([0.0, 1.0], [0.0, 1.0]) == 0


def test_extremes() -> None:
    assert drift.jsd([1, 0], [0, 1]) == pytest.approx(math.log(2))
    assert drift.jsd([3, 4, 5], [3, 4, 5]) == 0
    assert math.isnan(drift.jsd([0, 0], [1, 1]))
    assert drift.jsd(np.ones((3, 5, 4)), np.ones((5, 4))).shape == (3, 5)


def test_floors_of_1000_choices_of_64_experts() -> None:
    assert drift.jsd_floor(64, 1000, 1000) == pytest.approx(0.01575)
    assert drift.psi_floor(64, 1000, 1000) == pytest.approx(0.126)
    of_jsd, of_psi = [], []
    for seed in range(20):
        a, b = np.random.default_rng(seed).multinomial(1000, np.full(64, 1 / 64), 2)
        of_jsd.append(float(drift.jsd(a, b)))
        of_psi.append(float(drift.psi(a, b)))
    for found, golden in ((of_jsd, 0.01487), (of_psi, 0.121)):
        assert abs(np.mean(found) - golden) < 3 * np.std(found) / math.sqrt(20)
    many = np.random.default_rng(0).multinomial(1000, np.full(64, 1 / 64), (2, 4000))
    assert drift.jsd(*many).mean() == pytest.approx(0.01575, rel=0.03)
    assert drift.psi(*many).mean() == pytest.approx(0.126, rel=0.05)
    assert drift.chi_square(*many).mean() == pytest.approx(63, rel=0.02)
    assert drift.g_test(*many).mean() == pytest.approx(63, rel=0.03)


def test_design_effect_of_tokens_that_come_r_times() -> None:
    rng = np.random.default_rng(0)
    tokens_C = rng.integers(40, 200, 400)
    counts_CE = uniform_counts(tokens_C, tokens_C * 4, 16, rng)
    alone = drift.design_effect(counts_CE, tokens_C)
    assert alone == pytest.approx(1, abs=0.05)
    for r in (3, 10):
        repeated = drift.design_effect(counts_CE * r, tokens_C * r)
        assert repeated == pytest.approx(alone * r, rel=0.03)


def test_design_effect_of_odd_runs() -> None:
    assert math.isnan(drift.design_effect(np.array([[3, 4]]), [7]))
    assert math.isnan(drift.design_effect(np.array([[3, 4], [0, 0]]), [7, 0]))
    assert drift.design_effect(np.array([[7, 7], [5, 5]]), [7, 5]) == 1  # k = E
    alike = np.array([[8, 4], [8, 4], [0, 0]])  # more alike than chance: still no less than 1
    assert drift.design_effect(alike, [12, 12, 0]) == 1


def blocks(jump: int | None, seed: int, C: int = 24) -> np.ndarray:
    """Counts of blocks; from `jump` on with other rates."""
    rng = np.random.default_rng(seed)
    before, after = (rng.dirichlet(np.full(8, 20.0)) for _ in range(2))
    rates = [after if jump is not None and c >= jump else before for c in range(C)]
    return np.array([rng.multinomial(rng.integers(300, 500), p) for p in rates])


@pytest.mark.parametrize("jump", [6, 12, 18])
def test_a_jump_is_found_where_it_is(jump: int) -> None:
    made = [blocks(jump, 1), blocks(None, 2)]
    found = drift.change_points([drift.of_counts(x) for x in made])
    assert found[0].at == jump
    assert found[0].p == 0.001  # the order as recorded alone
    assert found[1].p > 0.01


def test_the_split_is_that_of_the_largest_chi_square() -> None:
    for seed in range(5):
        x = blocks(None, seed)
        naive = {s: drift.chi_square(x[:s].sum(0), x[s:].sum(0)) for s in range(3, 22)}
        (found,) = drift.change_points([drift.of_counts(x)], draws=9)
        assert found.at == max(naive, key=lambda s: naive[s])


def test_p_of_blocks_in_any_order_is_uniform() -> None:
    """Blocks that are far from independent tokens, too: each has rates of its own."""
    low, runs = 0, 200
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        rates = rng.dirichlet(np.full(8, 2.0), (3, 20))
        layers = [np.array([rng.multinomial(100, p) for p in of]) for of in rates]
        found = drift.change_points([drift.of_counts(x) for x in layers], draws=99)
        low += min(c.p for c in found) <= 0.1
    # 20 expected of three layers together; 3.3 standard deviations on either side.
    assert 6 <= low <= 34


def test_a_mean_that_jumps() -> None:
    rng = np.random.default_rng(0)
    weight_C = rng.integers(50, 100, 20)
    mean_C = 5 + rng.normal(size=20) / np.sqrt(weight_C) + (np.arange(20) >= 13) * 1.0
    mean_C[4] = np.nan
    (found,) = drift.change_points([drift.of_means(mean_C, weight_C)])
    assert (found.at, found.p) == (13, 0.001)
    (found,) = drift.change_points([drift.of_means(np.full(20, 3.0), weight_C)])
    assert found.p == 1
    (found,) = drift.change_points([drift.of_means(np.full(20, np.nan), weight_C)])
    assert found.p == 1


def test_a_split_that_is_given() -> None:
    x = blocks(12, 3)
    found = [drift.change_points([drift.of_counts(x)], at)[0] for at in (12, 2)]
    assert [c.at for c in found] == [12, 2]
    assert found[0].p == 0.001
    assert drift.change_points([]) == []
