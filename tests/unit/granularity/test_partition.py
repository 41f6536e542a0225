"""Regions against a dense sweep, and against polygons cut out of the square one by one."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import LabError
from moe_lens.granularity.partition import Floats, Set, in_square, on_circle, raster, through

SIZES = st.integers(2, 8).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, m)))


def drawn(experts: int, seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(experts, 2)), rng.normal(size=experts)


def best(logits: Floats, top_k: int) -> Set:
    """The k largest, by sorting."""
    return frozenset(sorted(range(len(logits)), key=lambda e: -logits[e])[:top_k])


def cut_out(gate: Floats, bias: Floats, chosen: Set, half: float) -> float:
    """Area of a set's region: the square, less every half plane that it does not lie in."""
    polygon = [(-half, -half), (half, -half), (half, half), (-half, half)]
    for i in chosen:
        for j in set(range(len(bias))) - chosen:
            a, c = gate[i] - gate[j], bias[i] - bias[j]
            kept = []
            for p, q in pairwise([*polygon, *polygon[:1]]):
                at_p, at_q = a @ p + c, a @ q + c
                if at_p >= 0:
                    kept.append(p)
                if (at_p > 0 > at_q) or (at_p < 0 < at_q):
                    t = at_p / (at_p - at_q)
                    kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
            polygon = kept
            if not polygon:
                return 0.0
    return 0.5 * sum(p[0] * q[1] - q[0] * p[1] for p, q in pairwise([*polygon, *polygon[:1]]))


@settings(max_examples=40, deadline=None)
@given(size=SIZES, seed=st.integers(0, 10_000))
def test_arcs_are_what_a_dense_sweep_finds(size: tuple[int, int], seed: int) -> None:
    top_k, (gate, _) = size[1], drawn(size[0], seed)
    arcs = on_circle(gate, top_k)
    assert sum(to - start for start, to, _ in arcs) == pytest.approx(2 * math.pi)
    assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(arcs))
    assert len({chosen for *_, chosen in arcs}) == len(arcs)  # regions are convex
    angles = np.linspace(0, 2 * math.pi, 2_000, endpoint=False)
    swept = {best(gate @ [math.cos(t), math.sin(t)], top_k) for t in angles}
    found = {chosen for *_, chosen in arcs}
    assert swept <= found
    wide = {chosen for start, to, chosen in arcs if to - start > 4 * math.pi / 2_000}
    assert wide <= swept
    for start, to, chosen in arcs:
        middle = (start + to) / 2
        assert best(gate @ [math.cos(middle), math.sin(middle)], top_k) == chosen


@settings(max_examples=40, deadline=None)
@given(size=SIZES, seed=st.integers(0, 10_000))
def test_regions_are_the_polygons_that_have_an_area(size: tuple[int, int], seed: int) -> None:
    (experts, top_k), (gate, bias) = size, drawn(size[0], seed)
    areas = {
        frozenset(c): cut_out(gate, bias, frozenset(c), 3.0)
        for c in combinations(range(experts), top_k)
    }
    assert sum(areas.values()) == pytest.approx(36)
    assert in_square(gate, bias, top_k) == {c for c, area in areas.items() if area > 1e-12}


def test_a_picture_shows_the_regions() -> None:
    gate, bias = drawn(16, 0)
    at, sets = raster(gate, bias, 8, 200)
    assert len(sets) == 200 * 200
    exact = in_square(gate, bias, 8)
    assert 0.9 * len(exact) < len(set(sets)) <= len(exact)
    assert set(sets) <= exact
    for place in (0, 199, 12_345, 39_999):  # a row after the other, from below
        x = np.array([at[place % 200], at[place // 200]])
        assert sets[place] == best(gate @ x + bias, 8)


# What 5 draws gave once, from the least to the most; the median of 200 lies within. (One draw of
# 64/8 has 40 to 52 regions nine times of ten, so its median is at the edge.)
@pytest.mark.parametrize(
    ("experts", "top_k", "low", "high"),
    [(4, 2, 4, 6), (8, 4, 8, 10), (16, 8, 18, 22), (32, 16, 38, 48), (64, 8, 46, 54),
     (16, 1, 5, 7), (16, 2, 9, 13)],
)  # fmt: skip
def test_random_routers_of_two_inputs_reach_few_sets(
    experts: int, top_k: int, low: int, high: int
) -> None:
    counts = [len(on_circle(drawn(experts, seed)[0], top_k)) for seed in range(200)]
    assert low <= median(counts) <= high
    assert median(counts) < math.comb(experts, top_k) or experts <= 4


def test_all_experts_are_one_region() -> None:
    gate, bias = drawn(3, 0)
    assert (
        on_circle(gate, 3) == [(0.0, 2 * math.pi, frozenset({0, 1, 2}))]
        or len(on_circle(gate, 3)) == 1
    )
    assert in_square(gate, bias, 3) == {frozenset({0, 1, 2})}


def test_one_expert() -> None:
    assert len(on_circle(np.ones((1, 2)), 1)) == 1
    assert in_square(np.ones((1, 2)), np.zeros(1), 1) == {frozenset({0})}


def test_a_plane_through_more_inputs() -> None:
    rng = np.random.default_rng(0)
    gate, bias = rng.normal(size=(6, 40)), rng.normal(size=6)
    seen, offset = through(gate, bias, np.random.default_rng(1))
    axes, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 2)))
    np.testing.assert_allclose(axes.T @ axes, np.eye(2), atol=1e-12)
    point = rng.normal(size=2)
    np.testing.assert_allclose(seen @ point + offset, gate @ (axes @ point) + bias)


def test_what_is_no_router_of_the_plane() -> None:
    with pytest.raises(LabError, match=r"\[experts, 2\], got \[4, 3\]"):
        on_circle(np.ones((4, 3)), 2)
    with pytest.raises(LabError, match="uses 1 to 4 of 4 experts; got 5"):
        in_square(np.ones((4, 2)), np.zeros(4), 5)
