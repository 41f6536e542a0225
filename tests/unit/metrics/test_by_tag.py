"""Tables of tags and experts: against loops, closed forms and simulated floors."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_lens.metrics.by_tag import (
    ENOUGH,
    PERMUTATIONS,
    committee,
    compared,
    entropies,
    leading,
    mean_of_pairs,
    moved_tags,
    mutual_information,
    tally,
)
from moe_lens.metrics.specialisation import divergences

tables = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.integers(0, 300)
)


def naive_information(table: np.ndarray) -> float:
    total = table.sum()
    out = 0.0
    for x, y in itertools.product(*map(range, table.shape)):
        p = table[x, y] / total
        if p:
            out += p * math.log(p / (table[x].sum() / total) / (table[:, y].sum() / total))
    return out


def naive_entropy(counts: np.ndarray) -> float:
    return -sum(float(c / counts.sum()) * math.log(c / counts.sum()) for c in counts if c)


@given(tables)
def test_information_and_entropy_are_their_definitions(table: np.ndarray) -> None:
    if not table.sum():
        assert math.isnan(mutual_information(table))
        assert math.isnan(entropies(table.ravel()))
        return
    assert mutual_information(table) == pytest.approx(naive_information(table), abs=1e-10)
    assert entropies(table.ravel()) == pytest.approx(naive_entropy(table.ravel()), abs=1e-10)
    stacked = np.stack([table, table * 2])
    assert mutual_information(stacked) == pytest.approx([naive_information(table)] * 2, abs=1e-10)


@given(tables)
def test_divergence_is_its_definition(table: np.ndarray) -> None:
    found = divergences(table)
    assert found.shape == (len(table), len(table))
    for g, h in itertools.product(range(len(table)), repeat=2):
        if not table[g].sum() or not table[h].sum():
            assert math.isnan(found[g, h])
            continue
        p, q = table[g] / table[g].sum(), table[h] / table[h].sum()
        wanted = naive_entropy((p + q) / 2) - (naive_entropy(p) + naive_entropy(q)) / 2
        assert found[g, h] == pytest.approx(wanted, abs=1e-10)
        assert found[g, h] == found[h, g]
        assert -1e-12 <= found[g, h] <= math.log(2) + 1e-12


def test_divergence_of_no_common_expert_is_ln_2_and_of_draws_stays_draws() -> None:
    table = np.array([[4, 0, 0], [0, 1, 5], [8, 0, 0]])
    wanted = np.log(2) * np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert divergences(table) == pytest.approx(wanted)
    assert divergences(np.stack([table, table[::-1]]))[1] == pytest.approx(wanted[::-1, ::-1])


def naive_leading(counts: list[int]) -> set[int]:
    """Every smallest set by brute force; their union has all that tie for the last place."""
    if not sum(counts):
        return set()
    for size in range(1, len(counts) + 1):
        found = [
            set(some)
            for some in itertools.combinations(range(len(counts)), size)
            if 2 * sum(counts[i] for i in some) >= sum(counts)
        ]
        if found:
            most = max(sum(counts[i] for i in some) for some in found)
            best = [some for some in found if sum(counts[i] for i in some) == most]
            return set.union(*best)
    raise AssertionError


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_leading_experts_are_the_smallest_half(counts: list[int]) -> None:
    found = leading(np.array([counts]))[0]
    assert set(np.flatnonzero(found)) == naive_leading(counts)


def test_a_committee_leads_everywhere_that_can_be_compared() -> None:
    half = ENOUGH * 4 // 2
    table = np.array(
        [[half, half, 0, 0], [0, half, half, 0], [0, 0, 0, 1]]  # the last: one choice
    )
    assert compared(table).tolist() == [True, True, False]
    assert committee(table).tolist() == [False, True, False, False]
    assert committee(np.stack([table, table[:, ::-1]])).tolist() == [
        [False, True, False, False],
        [False, False, True, False],
    ]


def test_mean_of_pairs_leaves_the_others_out() -> None:
    matrix = np.array([[0, 1, np.nan], [1, 0, 5.0], [np.nan, 5, 0]])
    assert mean_of_pairs(matrix, np.array([True, True, False])) == 1
    assert mean_of_pairs(matrix, np.array([False, True, True])) == 5
    assert math.isnan(mean_of_pairs(matrix, np.array([True, False, False])))


def test_tally_counts_choices_and_no_others() -> None:
    ids = np.array([[0, 2], [1, -1], [-1, -1], [2, 0]])
    value = np.array([1, 0, 0, 1])
    wanted = Counter((v, e) for v, row in zip(value, ids, strict=True) for e in row if e >= 0)
    found = tally(value, ids, 3, 3)
    assert found.shape == (3, 3)
    assert all(found[v, e] == wanted[v, e] for v in range(3) for e in range(3))
    assert tally(np.empty(0, np.int64), np.empty((0, 2), np.int64), 2, 3).tolist() == [[0] * 3] * 2


def test_information_of_independent_pairs_has_its_known_bias() -> None:
    """(D - 1)(E - 1) / 2n: .063 of 5 tags and 64 experts at n = 2000; simulated .0649."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pairs = rng.integers(5, size=2000) * 64 + rng.integers(64, size=2000)
        found.append(mutual_information(np.bincount(pairs, minlength=320).reshape(5, 64)))
    error = np.std(found, ddof=1) / math.sqrt(20)
    assert np.mean(found) == pytest.approx(0.06485, abs=3 * error)
    assert np.mean(found) == pytest.approx((5 - 1) * (64 - 1) / (2 * 2000), abs=3 * error)
    assert error < 0.001


def test_divergence_of_alike_samples_has_its_known_floor() -> None:
    """(E - 1) / 8 (1/n1 + 1/n2): .01575 of 64 experts that are alike, at n = 1000."""
    rng = np.random.default_rng(0)
    found = [
        divergences(rng.multinomial(1000, np.full(64, 1 / 64), size=2))[0, 1] for _ in range(200)
    ]
    error = np.std(found, ddof=1) / math.sqrt(200)
    assert np.mean(found) == pytest.approx(63 / 8 * 2 / 1000, abs=3 * error)
    assert error < 0.0003


def test_permuting_tags_keeps_documents_whole() -> None:
    """Of documents with experts of their own: every draw hands out whole documents."""
    sizes, tags = [3, 5, 7, 11], [0, 0, 1, 2]
    sequence = np.repeat(np.arange(4), sizes)
    tag = np.array(tags)[sequence]
    ids = sequence[:, None].copy()  # each document has one expert
    drawn = moved_tags(ids, tag, sequence, 3, 4)
    assert drawn.shape == (PERMUTATIONS, 3, 4)
    for table in drawn:
        assert table.sum(0).tolist() == sizes
        assert (table > 0).sum() == 4
        assert sorted((table > 0).sum(1)) == [1, 1, 2]
        assert (table > 0).sum(1).tolist() == [2, 1, 1]  # a tag keeps its number of documents
    seen = {tuple(np.argmax(table > 0, axis=0)) for table in drawn}
    assert len(seen) == 12  # all the ways to give them out: 4! / 2!


def test_a_sequence_of_two_tags_is_two_documents() -> None:
    sequence = np.array([0, 0, 0, 1, 1])
    tag = np.array([0, 1, 1, 0, 0])
    ids = np.array([[0], [1], [1], [2], [2]])
    for table in moved_tags(ids, tag, sequence, 2, 3):
        assert table.sum(0).tolist() == [1, 2, 2]
        assert ((table > 0).sum(0) == 1).all()
        assert (table > 0).sum(1).tolist() == [2, 1]
