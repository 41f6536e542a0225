"""Hit rates against a simulation of one cache at a time, the optimum against all that can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.expert_tokens import simulated

from moe_lens.metrics.accesses import Accesses, accesses
from moe_lens.metrics.cache import POLICIES, hit_rates

Sets = list[set[int]]


@st.composite
def strings(draw: st.DrawFn, *, most: int = 30, experts: int = 7) -> tuple[Sets, int, int]:
    """Accesses of 0 to 3 experts each, how many experts there are, and where counting begins."""
    n = draw(st.integers(1, experts))
    sets = draw(st.lists(st.sets(st.integers(0, n - 1), max_size=3), min_size=1, max_size=most))
    return sets, n, draw(st.integers(0, len(sets) - 1))


def best(sets: Sets, size: int, experts: int) -> int:
    """The most hits that any choice of evictions and of a beginning can have: all are tried."""
    states = {frozenset(c): 0 for c in combinations(range(experts), min(size, experts))}
    for needed in sets:
        after: dict[frozenset[int], int] = {}
        for content, hits in states.items():
            hits += len(needed & content)
            others = content - needed
            keep = min(size - len(needed), len(others))
            for rest in combinations(sorted(others), keep):
                new = frozenset(needed | set(rest))
                after[new] = max(after.get(new, 0), hits)
        states = after
    return max(states.values())


def worths(sets: Sets, first: int, experts: int) -> dict[str, Callable[[int, int], object]]:
    def last(t: int, e: int) -> int:
        return max((i for i in range(t + 1) if e in sets[i]), default=-1)

    def times(t: int, e: int) -> int:
        return sum(e in needed for needed in sets[: t + 1])

    before = Counter(e for needed in sets[:first] for e in needed)
    later = Counter(e for needed in sets[first:] for e in needed)
    return {
        "lru": last,
        "lfu": lambda t, e: (times(t, e), last(t, e)),
        "static": lambda t, e: before[e],
        "static_hindsight": lambda t, e: later[e],
    }


@settings(deadline=None, max_examples=60)
@given(made=strings())
def test_every_policy_at_every_size_is_its_simulation(made: tuple[Sets, int, int]) -> None:
    sets, experts, first = made
    requests = sum(map(len, sets[first:]))
    rates = hit_rates(accesses(sets, experts), first)
    largest = max(map(len, sets))
    sizes = [] if not any(sets) else list(range(largest, experts + 1))
    assert list(rates["size"]) == sizes
    for row in rates.to_dict("records"):
        assert row["chance"] == row["resident"] == row["size"] / experts
        for name, worth in worths(sets, first, experts).items():
            if requests == 0 or (name == "static" and not any(sets[:first])):
                assert math.isnan(row[name])
            else:
                hits = simulated(sets, row["size"], first, worth)
                assert row[name] == pytest.approx(hits / requests), (name, row["size"])


@settings(deadline=None, max_examples=40)
@given(made=strings(most=8, experts=5))
def test_the_optimum_is_the_best_of_all_that_can_be(made: tuple[Sets, int, int]) -> None:
    sets, experts, first = made
    requests = sum(map(len, sets[first:]))
    for row in hit_rates(accesses(sets, experts), first).to_dict("records"):
        if requests:
            assert row["optimum"] == pytest.approx(
                best(sets[first:], row["size"], experts) / requests
            )


def test_long_strings_and_large_accesses_too() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        sets = [set(rng.choice(10, rng.integers(0, 6), replace=False).tolist()) for _ in range(20)]
        sets[0].add(0)
        first = int(rng.integers(1, 4))
        rates = hit_rates(accesses(sets, 10), first)
        requests = sum(map(len, sets[first:]))
        for name, worth in worths(sets, first, 10).items():
            expected = [simulated(sets, size, first, worth) / requests for size in rates["size"]]
            assert rates[name].tolist() == pytest.approx(expected), name


def test_the_optimum_of_many_small_strings() -> None:
    rng = np.random.default_rng(6)
    for _ in range(150):
        sets = [set(rng.choice(5, rng.integers(1, 3), replace=False).tolist()) for _ in range(9)]
        rates = hit_rates(accesses(sets, 5))
        expected = [best(sets, size, 5) / sum(map(len, sets)) for size in rates["size"]]
        assert rates["optimum"].tolist() == pytest.approx(expected), sets


@settings(deadline=None, max_examples=40)
@given(made=strings(most=60, experts=12))
def test_nothing_beats_the_optimum_and_more_room_never_hurts(made: tuple[Sets, int, int]) -> None:
    sets, experts, first = made
    rates = hit_rates(accesses(sets, experts), first)
    for name in POLICIES:
        known = rates.dropna(subset=[name])
        assert (known["optimum"] >= known[name] - 1e-12).all()
        assert (np.diff(known[name]) >= -1e-12).all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), top_k=st.integers(1, 4), first=st.integers(1, 10))
def test_a_cache_of_top_k_finds_what_the_last_token_needed(
    seed: int, top_k: int, first: int
) -> None:
    rng = np.random.default_rng(seed)
    sets = [set(rng.choice(6, top_k, replace=False).tolist()) for _ in range(20)]
    row = hit_rates(accesses(sets, 6), first).iloc[0]
    overlap = [len(a & b) for a, b in zip(sets[first - 1 : -1], sets[first:], strict=True)]
    share = sum(overlap) / (20 - first) / top_k
    assert row["size"] == top_k
    for name in ("lru", "lfu", "static", "static_hindsight"):
        assert row[name] == pytest.approx(share)
    found = (sum(overlap[1:]) + top_k) / (20 - first) / top_k
    assert row["optimum"] == pytest.approx(found)


def walk(experts: int, top_k: int, keep: float, tokens: int) -> Accesses:
    """Each expert of a token is kept with this probability, the rest are drawn anew."""
    rng = np.random.default_rng(20)
    now = rng.choice(experts, top_k, replace=False)
    sets = []
    for _ in range(tokens):
        kept = now[rng.random(top_k) < keep]
        others = np.setdiff1d(np.arange(experts), kept)
        now = np.concatenate([kept, rng.choice(others, top_k - len(kept), replace=False)])
        sets.append(now.tolist())
    return accesses(sets, experts)


@pytest.mark.parametrize(
    ("experts", "top_k", "size", "keep", "lru", "optimum"),
    [
        (8, 2, 4, 0.0, 0.500, 0.675),
        (8, 2, 4, 0.6, 0.783, 0.863),
        (64, 8, 16, 0.0, 0.250, 0.491),
        (64, 8, 16, 0.6, 0.679, 0.781),
    ],
)
def test_known_sources(
    experts: int, top_k: int, size: int, keep: float, lru: float, optimum: float
) -> None:
    """Of lru the expectation is exact: kept + redrawn * (M - kept) / (E - kept), summed."""
    odds = [math.comb(top_k, j) * keep**j * (1 - keep) ** (top_k - j) for j in range(top_k + 1)]
    hits = [j + (top_k - j) * (size - j) / (experts - j) for j in range(top_k + 1)]
    expected = sum(p * h for p, h in zip(odds, hits, strict=True)) / top_k
    assert expected == pytest.approx(lru, abs=1e-3)
    tokens = 4000
    rates = hit_rates(walk(experts, top_k, keep, tokens), tokens // 2)
    row = rates[rates["size"] == size].iloc[0]
    error = math.sqrt(0.25 / (tokens // 2 * top_k))  # at most, of a share of so many requests
    # Requests of a walk that keeps its experts hang together: twice as much.
    limit = 4 * error * (1 + (keep > 0))
    assert row["lru"] == pytest.approx(expected, abs=limit)
    assert row["lfu"] == pytest.approx(expected, abs=limit)
    # These are means of another simulation, of unknown length: its error is no less than ours.
    assert row["optimum"] == pytest.approx(optimum, abs=2 * limit)


def test_an_access_does_not_evict_its_own() -> None:
    """Taken one by one, a cache of 2 would load 0 for 2, and then 2 for 0."""
    sets = [{0, 1}, {0, 2}, {0, 2}]
    rates = hit_rates(accesses(sets, 3), 1)
    assert rates.set_index("size")["lru"].to_dict() == {2: 3 / 4, 3: 3 / 4}


def test_ids_out_of_range_are_refused() -> None:
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=rf"from 0 to 3; got \[.*{bad}"):
            accesses([[0, 1], [bad]], 4)
