"""Numbers of unseen things against counts by hand, loops over the formulas, and known samples."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import richness as r

samples = st.lists(st.integers(0, 12), min_size=1, max_size=60)


@given(samples)
def test_a_tally_counts_how_often_each_count_occurs(sample: list[int]) -> None:
    counts = Counter(sample)
    times_M = r.tally(sample)
    assert {m: n for m, n in enumerate(times_M) if n} == dict(Counter(counts.values()))
    assert r.seen(times_M) == len(sample)
    assert r.distinct(times_M) == len(counts)
    assert r.tally([[x, 1] for x in sample]).tolist() == times_M.tolist()


@given(samples)
def test_estimates_are_their_formulas(sample: list[int]) -> None:
    counts, n = list(Counter(sample).values()), len(sample)
    times_M = r.tally(sample)
    f1, f2 = counts.count(1), counts.count(2)
    assert r.coverage(times_M) == pytest.approx(1 - f1 / n)
    assert r.chao1(times_M) == pytest.approx(len(counts) + f1 * (f1 - 1) / (2 * (f2 + 1)))
    plain = -sum(c / n * math.log2(c / n) for c in counts)
    assert r.entropy(times_M) == pytest.approx(plain, abs=1e-12)
    covered = 1 - (f1 if f1 < n else n - 1) / n
    shares = [covered * c / n for c in counts]
    corrected = -sum(q * math.log2(q) / (1 - (1 - q) ** n) for q in shares if q > 0)
    assert r.chao_shen(times_M) == pytest.approx(corrected, abs=1e-9)
    if n > 1:
        same = sum(c * (c - 1) for c in counts) / (n * (n - 1))
        assert r.collision(times_M) == pytest.approx(same)
        assert r.effective(times_M) == (pytest.approx(1 / same) if same else math.inf)


@given(samples)
def test_chao_wang_jost_is_its_formula(sample: list[int]) -> None:
    counts, n = list(Counter(sample).values()), len(sample)
    if n < 2:
        assert math.isnan(r.chao_wang_jost(r.tally(sample)))
        return
    f1, f2 = counts.count(1), counts.count(2)
    total = sum(c / n * sum(1 / k for k in range(c, n)) for c in counts)
    a = 2 / ((n - 1) * (f1 - 1) + 2) if f1 > 1 else 1
    if f2:
        a = 2 * f2 / ((n - 1) * f1 + 2 * f2)
    if f1 and a < 1:
        rest = -math.log(a) - sum((1 - a) ** k / k for k in range(1, n))
        total += f1 / n * (1 - a) ** (1 - n) * rest
    assert r.chao_wang_jost(r.tally(sample)) == pytest.approx(total / math.log(2), abs=1e-6)


def test_the_collision_probability_has_no_bias() -> None:
    """Over all samples of three of three things: exactly the sum of squares."""
    p = (0.5, 0.3, 0.2)
    mean = sum(
        math.prod(p[x] for x in sample) * float(r.collision(r.tally(sample)))
        for sample in product(range(3), repeat=3)
    )
    assert mean == pytest.approx(sum(x * x for x in p))


def test_the_entropy_of_an_even_spread_is_found_where_most_was_seen() -> None:
    """1,820 sets, nine tokens each: the plain entropy is 0.08 bits too low."""
    draws = np.random.default_rng(0).integers(0, 1820, (20, 16_384))
    tallies = [r.tally(draw) for draw in draws]
    true = math.log2(1820)
    wanted = [(r.entropy, -0.0815), (r.chao_shen, -0.066), (r.chao_wang_jost, 0.0)]
    for estimate, bias in wanted:
        errors = [float(estimate(x)) - true for x in tallies]
        assert np.mean(errors) == pytest.approx(bias, abs=0.004)


def test_draws_are_measured_one_by_one() -> None:
    drawn = [r.tally(x) for x in ([1, 1, 2, 3], [1, 1, 1, 1], [5, 6, 7, 8])]
    both_RM = r.stacked(drawn)
    assert both_RM.shape == (3, 5)
    for measure in (r.seen, r.distinct, r.coverage, r.chao1, r.entropy, r.chao_shen, r.collision,
                    r.effective):  # fmt: skip
        assert measure(both_RM).tolist() == pytest.approx([float(measure(x)) for x in drawn])


def test_an_entropy_is_trusted_where_half_was_seen() -> None:
    half, less = r.tally([1, 1, 2, 3]), r.tally([1, 1, 2, 3, 4])
    assert r.trusted(1.5, half) == 1.5
    assert math.isnan(r.trusted(1.5, less))
    assert r.trusted([1.0, 2.0], r.stacked([half, less])).tolist() == pytest.approx(
        [1, math.nan], nan_ok=True
    )


def test_the_commonest() -> None:
    times_M = r.tally([1] * 5 + [2] * 3 + [3, 4])
    assert [r.top_share(times_M, m) for m in (0, 1, 2, 3, 9)] == [0, 0.5, 0.8, 0.9, 1]


@pytest.mark.parametrize("sample", [[], [3]])
def test_too_little_was_seen(sample: list[int]) -> None:
    times_M = r.tally(sample)
    assert math.isnan(r.collision(times_M))
    assert math.isnan(r.trusted(r.entropy(times_M), times_M))
    assert math.isnan(r.chao_wang_jost(times_M))
    assert r.distinct(times_M) == len(sample)
    assert math.isnan(r.coverage(times_M)) == (not sample)
    assert math.isnan(r.top_share(times_M, 1)) == (not sample)


def gaussian(
    seed: int, experts: int, top_k: int, width: int, tokens: int = 200_000
) -> tuple[float, ...]:
    """Sets of a random linear router without a bias, on random tokens."""
    rng = np.random.default_rng(seed)
    tokens_ND = rng.standard_normal((tokens, width), np.float32)
    logits_NE = tokens_ND @ rng.standard_normal((width, experts), np.float32)
    ids_NK = np.argpartition(logits_NE, experts - top_k, 1)[:, experts - top_k :]
    times_M = r.tally((np.uint64(1) << ids_NK.astype(np.uint64)).sum(1))
    return tuple(float(f(times_M)) for f in (r.distinct, r.entropy, r.chao_shen, r.effective,
                                             r.coverage))  # fmt: skip


@pytest.mark.parametrize(
    ("width", "sets", "within"), [(2, 24, 6), (4, 428, 40), (8, 3874, 500), (32, 12_067, 740)]
)
def test_the_width_decides_how_many_sets_a_router_reaches(
    width: int, sets: int, within: int
) -> None:
    """16 experts, 8 of a token, 200,000 tokens: known values, within three deviations of seeds."""
    found = [gaussian(seed, 16, 8, width)[0] for seed in range(3)]
    assert np.mean(found) == pytest.approx(sets, abs=within)


def test_of_four_thousand_million_sets_a_sample_shows_one_in_a_hundred() -> None:
    """64 experts, 8 of a token, width 32: the plain entropy is log2 n, and nothing else."""
    _, plain, corrected, effective, coverage = gaussian(1, 64, 8, 32)
    assert plain == pytest.approx(17.60, abs=0.005)
    assert math.log2(200_000) == pytest.approx(17.61, abs=0.005)
    assert corrected == pytest.approx(24.06, abs=0.3)
    assert effective == pytest.approx(1.64e7, rel=0.2)
    assert coverage == pytest.approx(0.011, abs=0.002)
