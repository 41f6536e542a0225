"""From layer to layer: loops over tokens, planted transitions, the closed form of the null."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.metrics.moves import moves, prefetched, transition_matrix

ALL = [m for m in metrics().values() if m.group == "transitions"]
B, E = 5, 4

ids = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        arrays(np.int64, (n, 3), elements=st.integers(0, 10_000)),
        arrays(np.int64, (n, 2), elements=st.integers(0, 10_000)),
        st.integers(0, 3),
    )
)


def choices(seeds_NK: np.ndarray, experts: int, missing: int) -> np.ndarray:
    """Different experts for each token, some of the last choices missing."""
    rows = [np.random.default_rng(row).permutation(experts)[: len(row)] for row in seeds_NK]
    ids_NK = np.array(rows, np.int64)
    ids_NK[seeds_NK[:, -1] % 4 < missing, -1] = -1
    return ids_NK


def known(before_NK: np.ndarray, ids_NK: np.ndarray, experts: int, length: int = 10) -> Evidence:
    at_N = np.arange(len(ids_NK))
    return Evidence(
        experts=experts, outputs=experts, top_k=ids_NK.shape[1], ids_NK=ids_NK,
        before_NK=before_NK, sequence_N=at_N // length, position_N=at_N % length,
    )  # fmt: skip


def found(name: str, given: Evidence) -> Measured:
    return measure(METRICS[name], given)


def uniform(tokens: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((tokens, experts)).argsort(1)[:, :top_k]


@given(ids)
def test_the_matrix_counts_pairs(drawn: tuple[np.ndarray, np.ndarray, int]) -> None:
    before_NK, ids_NK = choices(drawn[0], B, drawn[2]), choices(drawn[1], E, drawn[2])
    every: dict[int, Counter[int]] = defaultdict(Counter)
    alike: dict[int, Counter[int]] = defaultdict(Counter)
    for before, chosen in zip(before_NK.tolist(), ids_NK.tolist(), strict=True):
        for i in (x for x in before if x >= 0):
            every[i].update(x for x in chosen if x >= 0)
        for i, j in zip(before, chosen, strict=False):
            if i >= 0 and j >= 0:
                alike[i][j] += 1
    for counted, same_rank in ((every, False), (alike, True)):
        matrix_BE = transition_matrix(before_NK, ids_NK, E, same_rank=same_rank)
        assert matrix_BE.shape[1] == E
        for i, row_E in enumerate(matrix_BE):
            total = counted[i].total()
            assert row_E.tolist() == pytest.approx(
                [counted[i][j] / total if total else 0 for j in range(E)]
            )


def test_pairs_of_equal_rank_miss_what_crosses_over() -> None:
    """The released analysis of OLMoE: expert 0 is always first, expert 3 follows it as second."""
    before_NK = np.tile([0, 1], (40, 1))
    ids_NK = np.tile([2, 3], (40, 1))
    assert transition_matrix(before_NK, ids_NK, 4)[0].tolist() == [0, 0, 0.5, 0.5]
    assert transition_matrix(before_NK, ids_NK, 4, same_rank=True)[0].tolist() == [0, 0, 1, 0]


@given(ids)
@settings(max_examples=30)
def test_uncertainty_and_affinity_against_loops(
    drawn: tuple[np.ndarray, np.ndarray, int],
) -> None:
    before_NK, ids_NK = choices(drawn[0], B, drawn[2]), choices(drawn[1], E, drawn[2])
    pairs = list(zip(before_NK[:, 0].tolist(), ids_NK[:, 0].tolist(), strict=True))
    n = len(pairs)
    joint = Counter(pairs)
    befores, nexts = Counter(i for i, _ in pairs), Counter(j for _, j in pairs)
    shared = sum(c / n * math.log(c * n / (befores[i] * nexts[j])) for (i, j), c in joint.items())
    of_next = -sum(c / n * math.log(c / n) for c in nexts.values())
    followed = sum(max(joint[i, j] for j in nexts) for i in befores) / n
    made = moves(before_NK, ids_NK)
    assert made.affinity_R[0] == pytest.approx(followed)
    if of_next:
        assert made.uncertainty_R[0] == pytest.approx(shared / of_next, abs=1e-9)
    else:
        assert np.isnan(made.uncertainty_R).all()


def test_experts_have_no_number_across_layers() -> None:
    """Renaming the experts of either layer changes nothing."""
    before_NK, ids_NK = uniform(300, 6, 2, 0), uniform(300, 8, 2, 1)
    ids_NK[:150, 0] = before_NK[:150, 0]  # some dependence
    ids_NK[:150, 1] = 7
    rng = np.random.default_rng(2)
    one = known(before_NK, ids_NK, 8)
    other = known(rng.permutation(6)[before_NK], rng.permutation(8)[ids_NK], 8)
    for name in ("transition_uncertainty", "affinity"):
        assert found(name, one).value == pytest.approx(found(name, other).value)


def test_a_next_layer_that_follows_is_known_in_full() -> None:
    before_NK = uniform(800, 16, 1, 0)
    given = known(before_NK, np.random.default_rng(1).permutation(16)[before_NK], 16)
    for name in ("transition_uncertainty", "affinity", "prefetch_recall", "prefetch_exact"):
        assert found(name, given).value == pytest.approx(1), name
    assert found("transition_uncertainty", given).beyond == "high"
    assert found("affinity", given).beyond == "high"
    chance = found("prefetch_recall", given).chance
    assert chance is not None
    assert chance.expected < 0.1


def test_independent_layers_are_within_chance_and_chance_is_biased() -> None:
    experts, tokens = 8, 3000
    inside = 0
    for seed in range(5):
        given = known(uniform(tokens, experts, 2, seed), uniform(tokens, experts, 2, 99 + seed), 8)
        for name in ("transition_uncertainty", "affinity"):
            inside += found(name, given).beyond == ""
    assert inside == 10
    chance = found("transition_uncertainty", given).chance
    assert chance is not None
    bias = (experts - 1) ** 2 / (2 * tokens) / math.log(experts)
    assert chance.expected == pytest.approx(bias, rel=0.05)
    recall, exact = found("prefetch_recall", given), found("prefetch_exact", given)
    assert recall.value == pytest.approx(2 / 8, abs=0.02)
    assert exact.value == pytest.approx(1 / 28, abs=0.02)
    assert recall.chance is not None
    assert recall.chance.expected == pytest.approx(2 / 8, abs=0.02)


def test_loads_alone_are_no_transition() -> None:
    """One expert takes most tokens of both layers: chance knows it."""
    rng = np.random.default_rng(3)
    skewed = [np.where(rng.random((2000, 1)) < 0.8, 0, rng.integers(0, 6, (2000, 1)))
              for _ in range(2)]  # fmt: skip
    affinity = found("affinity", known(skewed[0], skewed[1], 6))
    assert affinity.value > 0.8
    assert affinity.beyond == ""


@given(ids)
@settings(max_examples=30)
def test_prefetching_against_a_loop(drawn: tuple[np.ndarray, np.ndarray, int]) -> None:
    before_NK, ids_NK = choices(drawn[0], B, drawn[2]), choices(drawn[1], E, drawn[2])
    sequence_N = np.arange(len(ids_NK)) // 4
    made = prefetched(before_NK, ids_NK, sequence_N, E, 2)
    begins = [t for t in range(1, len(ids_NK)) if t % 4 == 0]
    n = len(ids_NK)
    first = min(begins, key=lambda t: (abs(t - n / 2), t)) if begins else n // 2
    sets = [([x for x in a if x >= 0], [x for x in b if x >= 0])
            for a, b in zip(before_NK.tolist(), ids_NK.tolist(), strict=True)]  # fmt: skip
    popular = Counter(x for _, chosen in sets[:first] for x in chosen)
    pairs: dict[int, Counter[int]] = defaultdict(Counter)
    for before, chosen in sets[:first]:
        for i in before:
            pairs[i].update(chosen)
    hits: dict[str, list[float]] = {"popularity": [], "last_layer": []}
    for before, chosen in sets[first:]:
        score = {
            e: sum(pairs[i][e] / pairs[i].total() for i in before if pairs[i]) for e in range(E)
        }
        for name, worth in (("popularity", dict.fromkeys(score, 0.0)), ("last_layer", score)):
            ranked = sorted((-round(worth[e], 9), -popular[e], e) for e in range(E))
            order = [e for _, _, e in ranked]
            hits[name].append(len(set(order[:2]) & set(chosen)) / len(chosen))
    for name, shares in hits.items():
        sizes = [len(chosen) for _, chosen in sets[first:]]
        if not first:
            assert math.isnan(made.recall[name])
            continue
        assert made.recall[name] == pytest.approx(np.average(shares, weights=sizes))
        assert made.exact[name] == pytest.approx(np.mean([s == 1 for s in shares]))


def test_tokens_that_need_nothing_are_not_served() -> None:
    """Two scored tokens: one finds its expert, the other chose none."""
    before_NK = np.array([[0], [0], [0], [0]])
    made = prefetched(before_NK, np.array([[1], [1], [2], [-1]]), np.array([0, 0, 1, 1]), 4, 1)
    assert made.exact["last_layer"] == 0
    made = prefetched(before_NK, np.array([[1], [1], [1], [-1]]), np.array([0, 0, 1, 1]), 4, 1)
    assert made.exact["last_layer"] == made.recall["last_layer"] == 1


NOTHING = np.full((6, 2), -1)


@pytest.mark.parametrize(
    ("before_NK", "ids_NK"),
    [
        (np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)),
        (np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64)),
        (NOTHING, NOTHING),
        (np.array([[0, 1]]), np.array([[2, 3]])),
        (np.zeros((6, 1), np.int64), np.zeros((6, 1), np.int64)),
    ],
    ids=["no tokens", "no choices at all", "no choices", "one token", "one expert"],
)
def test_too_little_to_say_anything(before_NK: np.ndarray, ids_NK: np.ndarray) -> None:
    cell = found("transition_uncertainty", known(before_NK, ids_NK, 4))
    assert math.isnan(cell.value)
    assert cell.lacks
    for each in ALL:
        done = measure(each, known(before_NK, ids_NK, 4))
        assert math.isnan(done.value) == bool(done.lacks)
        assert done.beyond == ""


def test_a_token_without_a_first_choice_counts_nowhere() -> None:
    before_NK, ids_NK = uniform(60, 5, 2, 0), uniform(60, 4, 2, 1)
    more = known(np.concatenate([before_NK, NOTHING]), np.concatenate([ids_NK, ids_NK[:6]]), 4)
    without = known(before_NK, ids_NK, 4)
    for name in ("transition_uncertainty", "affinity"):
        assert found(name, more).value == pytest.approx(found(name, without).value)


def test_a_first_layer_has_none_before_it() -> None:
    given = Evidence(experts=4, outputs=4, top_k=2, ids_NK=uniform(9, 4, 2, 0))
    for each in ALL:
        assert measure(each, given).lacks == "no layer before it in its stream"
