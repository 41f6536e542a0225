"""Cosines of router rows: against loops, planted twins, and rows drawn at random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_lens.metrics import similarity


def test_norms_and_cosines_against_a_loop() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 7))
    cosine = similarity.cosines(rows)
    for a in range(5):
        length = math.sqrt(sum(x * x for x in rows[a]))
        assert similarity.norms(rows)[a] == pytest.approx(length)
        for b in range(5):
            dot = sum(x * y for x, y in zip(rows[a], rows[b], strict=True))
            wanted = dot / length / math.sqrt(sum(x * x for x in rows[b]))
            assert cosine[a, b] == pytest.approx(wanted)
    scaled = similarity.cosines(rows * np.array([1, 2, 3, 4, 0.1])[:, None])
    assert scaled == pytest.approx(cosine)


def test_a_row_of_zeros_points_nowhere() -> None:
    cosine = similarity.cosines([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert np.isnan(cosine[1]).all()
    assert cosine[0, 2] == 1
    assert similarity.pairs(cosine, 0.9).to_dict("records") == [
        {"expert": 0, "other": 2, "cosine": 1.0}
    ]


def test_a_planted_twin_is_found_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(64, 256))
    chance = similarity.by_chance(64, 256)
    assert chance.high is not None
    assert similarity.pairs(similarity.cosines(rows), chance.high).empty
    rows[40] = 3 * rows[7]  # longer, the same direction
    rows[9] = rows[8] + 0.5 * rng.normal(size=256)
    found = similarity.pairs(similarity.cosines(rows), chance.high)
    assert found[["expert", "other"]].to_numpy().tolist() == [[7, 40], [8, 9]]
    assert found["cosine"][0] == pytest.approx(1)
    assert found["cosine"][1] == pytest.approx(1 / math.sqrt(1.25), abs=0.03)


@pytest.mark.parametrize(("experts", "width"), [(8, 64), (64, 256), (12, 4)])
def test_chance_is_that_of_gaussian_rows(experts: int, width: int) -> None:
    """More experts than dimensions too: then some rows have to be alike."""
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(200):
        rows = rng.normal(size=(experts, width))
        rows /= np.sqrt((rows**2).sum(1, keepdims=True))
        dots = rows @ rows.T
        drawn.append(max(abs(dots[a, b]) for a in range(experts) for b in range(a)))
    chance = similarity.by_chance(experts, width)
    error = 3 * np.std(drawn) * math.sqrt(2 / 200)
    assert chance.expected == pytest.approx(np.mean(drawn), abs=error)
    assert chance.low is not None
    assert chance.high is not None
    inside = sum(chance.low <= x <= chance.high for x in drawn)
    assert inside >= 194


def test_chance_has_the_scale_of_one_over_the_root_of_the_width() -> None:
    """The largest of M normal numbers is about sqrt(2 ln 2M) standard deviations."""
    for experts, width in ((64, 1024), (256, 7168)):
        several = math.sqrt(2 * math.log(experts * (experts - 1)))
        expected = similarity.by_chance(experts, width).expected
        assert 0.85 < expected * math.sqrt(width) / several < 1


def test_sizes_that_have_no_chance() -> None:
    assert math.isnan(similarity.by_chance(1, 8).expected)
    assert similarity.by_chance(3, 1).expected == pytest.approx(1)  # on a line all are alike
    assert similarity.cosines(np.zeros((0, 3))).shape == (0, 0)
    with pytest.raises(ValueError, match="experts=0 and width=8 must be 1 or more"):
        similarity.by_chance(0, 8)
    with pytest.raises(ValueError, match=r"rows are \[E, D\]; got shape \(3,\)"):
        similarity.cosines([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"cosines are \[E, E\]; got shape \(2, 3\)"):
        similarity.pairs(np.zeros((2, 3)), 0.5)
