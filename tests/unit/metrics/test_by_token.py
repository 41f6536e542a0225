"""What ids and positions say about experts: against loops over tokens, and planted answers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import by_token
from moe_lens.metrics.by_token import (
    experts_by_position,
    given_ids,
    moved_positions,
    octave,
    of_ids,
    tokens_of_experts,
)

E, K = 6, 2


def tokens(seed: int, ids: int = 12, sequences: int = 9) -> tuple[np.ndarray, ...]:
    """Choices (some tokens chose fewer), token ids, sequences, tags of a sequence."""
    rng = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(sequences), rng.integers(20, 60, sequences))
    token_id = (rng.pareto(1.0, len(sequence)) * 3).astype(np.int64) % ids * 7
    score = rng.normal(size=(len(sequence), E))
    score[np.arange(len(sequence)), token_id % E] += 1.0
    chosen = np.argsort(-score, axis=1)[:, :K].astype(np.int64)
    chosen[rng.random(chosen.shape) < 0.1] = -1
    tag = rng.integers(0, 3, sequences)[sequence]
    return chosen, token_id, sequence, tag


def naive(chosen: np.ndarray, token_id: np.ndarray, min_count: int) -> dict[str, float]:
    """The numbers of `OfIds` as their definitions say, token by token."""
    often = {x for x, n in Counter(token_id.tolist()).items() if n >= min_count}
    kept = [(x, row) for x, row in zip(token_id.tolist(), chosen.tolist(), strict=True)]
    kept = [(x, row) for x, row in kept if x in often]
    pairs = Counter((x, e) for x, row in kept for e in row if e >= 0)
    of_id: Counter[int] = Counter()
    of_expert: Counter[int] = Counter()
    for (x, e), n in pairs.items():
        of_id[x] += n
        of_expert[e] += n
    total = sum(pairs.values())
    information = sum(
        n / total * math.log(n * total / of_id[x] / of_expert[e]) for (x, e), n in pairs.items()
    )
    entropy = -sum(n / total * math.log(n / total) for n in of_expert.values())
    within = 0.0
    for _, row in kept:
        k = sum(e >= 0 for e in row)
        within += k / total * math.log(k) if k else 0
    by_id = defaultdict(list)
    for x, row in kept:
        by_id[x].append(row)
    shares, agreeing, weights = [], 0.0, 0
    for rows in by_id.values():
        shares.append(max(sum(e in row for row in rows) for e in range(E)) / len(rows))
        if len(rows) > 1:
            for i, row in enumerate(rows):
                others = [other for j, other in enumerate(rows) if j != i]
                same = sum(row[0] >= 0 and row[0] == other[0] for other in others)
                agreeing += same / len(others)
            weights += len(rows)
    return {
        "information": information,
        "most": entropy - within,
        "max_share": float(np.mean(shares)),
        "agreement": agreeing / weights,
    }


@pytest.mark.parametrize("min_count", [1, 2, 10])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_ids_are_those_of_a_loop(seed: int, min_count: int) -> None:
    chosen, token_id, sequence, _ = tokens(seed)
    found = of_ids(chosen, token_id, sequence, E, min_count)
    wanted = naive(chosen, token_id, min_count)
    assert found.information[0] == pytest.approx(wanted["information"], abs=1e-10)
    assert found.most == pytest.approx(wanted["most"], abs=1e-10)
    assert found.max_share[0] == pytest.approx(wanted["max_share"], abs=1e-12)
    assert found.agreement[0] == pytest.approx(wanted["agreement"], abs=1e-12)


def test_ids_that_occur_once_make_specialists_of_all_experts() -> None:
    """The pitfall: without a least count, random choices of rare ids look like a vocabulary."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((2000, 16)), axis=1)[:, :2]
    token_id = np.where(np.arange(2000) < 1000, 0, np.arange(2000))  # one frequent, 1000 hapaxes
    sequence = np.repeat(np.arange(20), 100)
    every = of_ids(chosen, token_id, sequence, 16, min_count=1)
    frequent = of_ids(chosen, token_id, sequence, 16)
    assert every.max_share[0] > 0.99  # 1000 of 1001 ids at 100 %
    assert frequent.max_share[0] == pytest.approx(2 / 16, abs=0.04)
    # With the null beside it not even that one deceives.
    assert every.max_share[0] <= every.max_share[1:].max()


def test_all_k_choices_count_and_not_the_first_alone() -> None:
    chosen = np.tile([[0, 3], [1, 3]], (50, 1))  # expert 3 takes every token, never first
    found = of_ids(chosen, np.zeros(100, np.int64), np.repeat(np.arange(10), 10), 4)
    assert found.max_share[0] == 1.0
    assert found.agreement[0] == pytest.approx(49 / 99)


def test_moving_ids_keeps_loads_and_counts() -> None:
    """One id: whatever is moved, the numbers stay; a lookup table's do not."""
    chosen, token_id, sequence, _ = tokens(3)
    alone = of_ids(chosen, np.zeros_like(token_id), sequence, E)
    assert np.ptp(alone.max_share) == np.ptp(alone.agreement) == 0
    assert np.abs(alone.information).max() < 1e-12
    table = np.array([[1, 2], [0, 4], [5, 3], [2, 0]])
    lookup = of_ids(table[token_id % 4], token_id % 4, sequence, E)
    assert lookup.information[0] == pytest.approx(lookup.most)
    assert lookup.max_share[0] == lookup.agreement[0] == 1
    assert lookup.information[1:].max() < 0.2 * lookup.most


def test_what_lasts_along_a_text_is_no_lookup() -> None:
    """Ids and choices come in stretches, of which neither knows: shuffled tokens would differ."""
    beyond = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sequence = np.repeat(np.arange(12), 80)
        token_id = np.repeat(rng.integers(0, 10, 12 * 8), 10)
        chosen = np.repeat(rng.integers(0, 6, (12 * 8, 1)), 10, axis=0)
        found = of_ids(chosen, token_id, sequence, 6)
        beyond += found.information[0] > found.information[1:].max()
        shuffled = of_ids(chosen, rng.permutation(token_id), sequence, 6)
        assert found.information[0] > shuffled.information.max()
    assert beyond <= 2


def test_expected_largest_share_is_that_of_draws_from_the_load() -> None:
    """Independent choices: the null's mean is E[max of n_x draws from the load], by simulation."""
    rng = np.random.default_rng(1)
    load = np.array([0.5, 0.2, 0.1, 0.1, 0.1])
    chosen = rng.choice(5, size=(4000, 1), p=load)
    token_id = np.repeat(np.arange(200), 20)
    rng.shuffle(token_id)
    found = of_ids(chosen, token_id, np.repeat(np.arange(100), 40), 5)
    draws = rng.multinomial(20, load, size=100_000).max(1) / 20
    # The mean of 200 ids has a standard deviation of 0.0075; the load drawn one of 0.008.
    assert found.max_share[1:].mean() == pytest.approx(draws.mean(), abs=0.025)
    assert found.max_share[1:].min() <= found.max_share[0] <= found.max_share[1:].max()


def test_the_most_frequent_ids_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, token_id, sequence, _ = tokens(4)
    most = {x for x, _ in Counter(token_id.tolist()).most_common(3)}
    kept = np.isin(token_id, list(most))
    monkeypatch.setattr(by_token, "CELLS", 3 * E)
    found = of_ids(chosen, token_id, sequence, E)
    wanted = naive(chosen[kept], token_id[kept], 10)
    assert found.information[0] == pytest.approx(wanted["information"], abs=1e-10)
    assert found.max_share[0] == pytest.approx(wanted["max_share"], abs=1e-12)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_tags_say_beyond_ids_is_that_of_a_loop(seed: int, turns: bool) -> None:
    chosen, token_id, sequence, tag = tokens(seed)
    if turns:  # tags take turns within a sequence
        tag = np.random.default_rng(seed).integers(0, 3, len(tag))
    count = Counter(token_id.tolist())
    share: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for x, row in zip(token_id.tolist(), chosen.tolist(), strict=True):
        for e in row:
            if e >= 0:
                share[x][e] += 1 / count[x]
    seen, expected = np.zeros((3, E)), np.zeros((3, E))
    for x, row, g in zip(token_id.tolist(), chosen.tolist(), tag.tolist(), strict=True):
        if count[x] < 10:
            continue
        for e in range(E):
            seen[g, e] += e in row
            expected[g, e] += share[x][e]
    wanted = 0.0
    for g in range(3):
        if seen[g].sum():
            f, of = seen[g] / seen[g].sum(), expected[g] / expected[g].sum()
            wanted += seen[g].sum() / seen.sum() * float((f * np.log(f / of)).sum())
    found = given_ids(chosen, token_id, sequence, tag, 3, E)
    assert found.shape == (200,)
    assert found[0] == pytest.approx(wanted, abs=1e-10)


def test_tags_that_differ_in_their_words_alone_say_nothing_beyond_them() -> None:
    rng = np.random.default_rng(2)
    sequence = np.repeat(np.arange(30), 50)
    tag = sequence % 2
    token_id = rng.integers(0, 8, len(sequence)) + 4 * tag  # ids 4 to 7 are of both
    lookup = np.argsort(rng.random((12, E)), axis=1)[:, :K]
    found = given_ids(lookup[token_id], token_id, sequence, tag, 2, E)
    assert found == pytest.approx(0, abs=1e-12)
    swayed = (lookup[token_id] + tag[:, None] * (rng.random(len(tag)) < 0.5)[:, None]) % E
    found = given_ids(swayed, token_id, sequence, tag, 2, E)
    assert found[0] > found[1:].max()


def test_no_frequent_id_gives_no_number() -> None:
    token_id = np.arange(40)
    chosen, sequence = np.zeros((40, 1), np.int64), np.repeat(np.arange(4), 10)
    found = of_ids(chosen, token_id, sequence, 2)
    assert np.isnan([found.most, found.information[0], found.max_share[0]]).all()
    assert np.isnan(given_ids(chosen, token_id, sequence, sequence % 2, 2, 2)).all()
    none = of_ids(np.full((40, 2), -1), np.zeros(40, np.int64), sequence, 2)
    assert np.isnan([none.most, none.agreement[0]]).all()
    empty = np.empty(0, np.int64)
    assert np.isnan(of_ids(np.empty((0, 2), np.int64), empty, empty, 2).most)


@given(st.integers(0, 2**40))
def test_octaves_are_bit_lengths(position: int) -> None:
    assert octave(np.array([position]))[0] == position.bit_length()


def test_turning_keeps_every_sequence_its_choices() -> None:
    """Of two sequences, the second with expert 1 alone at its first position."""
    sequence, position = np.repeat([0, 1], [4, 8]), np.r_[np.arange(4), np.arange(8)]
    ids = np.zeros((12, 1), np.int64)
    ids[4] = 1
    drawn = moved_positions(ids, position, sequence, 2)
    tokens_B = np.bincount(octave(position))
    assert (drawn.sum(-1) == tokens_B).all()
    assert (drawn[..., 1].sum(1) == 1).all()
    where = drawn[..., 1].argmax(1)
    # In the second sequence the octaves have 1, 1, 2 and 4 positions of 8.
    shares = np.bincount(where, minlength=4) / len(where)
    assert shares == pytest.approx([0.125, 0.125, 0.25, 0.5], abs=0.11)
    along = np.zeros((12, 1), np.int64)
    along[:4] = 1  # of one sequence: it stays in its octaves
    of_first = np.bincount(octave(np.arange(4)), minlength=4)
    assert (moved_positions(along, position, sequence, 2)[..., 1] == of_first).all()


def test_tokens_of_experts_are_those_of_a_loop() -> None:
    chosen, token_id, _, _ = tokens(5)
    found = tokens_of_experts(chosen, token_id, E, top=3, min_count=5)
    for expert, rows in found.groupby("expert"):
        overall = (chosen == expert).any(1).mean()
        wanted = []
        for x, n in Counter(token_id.tolist()).items():
            times = int((chosen[token_id == x] == expert).any(1).sum())
            if n >= 5 and times:
                wanted.append((-times / n, -times, x, n))
        wanted = sorted(wanted)[:3]
        assert rows["token_id"].tolist() == [x for _, _, x, _ in wanted]
        assert rows["tokens"].tolist() == [n for *_, n in wanted]
        assert rows["chosen"].tolist() == [-c for _, c, *_ in wanted]
        assert rows["share"].tolist() == pytest.approx([-s for s, *_ in wanted])
        assert rows["lift"].tolist() == pytest.approx([-s / overall for s, *_ in wanted])
    assert sorted(set(found["expert"])) == list(range(E))
    assert tokens_of_experts(chosen, token_id, E, min_count=10_000).empty


def test_experts_by_position_are_those_of_a_loop() -> None:
    chosen, _, sequence, _ = tokens(6)
    position = np.concatenate([np.arange(n) for n in np.bincount(sequence)]) + 2
    found = experts_by_position(chosen, position, E)
    assert found["first"].drop_duplicates().tolist() == [2, 4, 8, 16, 32]
    assert found["last"].drop_duplicates().tolist() == [3, 7, 15, 31, 63]
    for row in found.itertuples():
        there = (position >= row.first) & (position <= row.last)
        share = (chosen[there] == row.expert).any(1).mean()
        assert row.tokens == there.sum()
        assert row.share == pytest.approx(share)
        assert row.lift == pytest.approx(share / (chosen == row.expert).any(1).mean())
    first = experts_by_position(chosen, position * 0, E)
    assert first[["first", "last"]].drop_duplicates().to_numpy().tolist() == [[0, 0]]
