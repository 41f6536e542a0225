"""Locality: against loops over tokens, closed forms, the stored question, and what was planted."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planted import layer_of

from moe_lens.metrics import working_set
from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.metrics.locality import overlap_by_lag, repeated, touched, uniform
from moe_lens.metrics.sequences import MEASURES, PREFIX, Sequences
from moe_lens.queries.session import open_trace
from moe_lens.trace.synthetic import Hot, Spec

NAMES = [m.name for m in metrics().values() if m.group == "locality"]


class Token(NamedTuple):
    sequence: int
    position: int
    experts: tuple[int, ...]


def sequences_of(tokens: list[Token], experts: int, top_k: int) -> Sequences:
    ids = np.full((len(tokens), top_k), -1)
    for row, token in zip(ids, tokens, strict=True):
        row[: len(token.experts)] = token.experts
    places = np.array([t[:2] for t in tokens], np.int64).reshape(-1, 2)
    return Sequences(ids, places[:, 0], places[:, 1], experts)


def found(given: Sequences) -> dict[str, Measured]:
    known = Evidence(
        experts=given.experts, outputs=given.experts, ids_NK=given.ids_NK,
        sequence_N=given.sequence_N, position_N=given.position_N,
    )  # fmt: skip
    return {name: measure(METRICS[name], known) for name in NAMES}


def random(
    sequences: int, length: int, experts: int, top_k: int, seed: int, skew: float = 0.0
) -> Sequences:
    rng = np.random.default_rng(seed)
    n = sequences * length
    scores = -skew * np.log(np.arange(1, experts + 1)) + rng.gumbel(size=(n, experts))
    ids = np.argsort(-scores, axis=1)[:, :top_k]
    return Sequences(ids, np.arange(n) // length, np.arange(n) % length, experts)


EXPERTS = 70  # two words of bits


@st.composite
def some_tokens(draw: st.DrawFn) -> list[Token]:
    """Sequences with gaps, tokens that chose fewer than three, or none."""
    experts = st.lists(st.sampled_from([0, 1, 5, 63, 64, 69]), max_size=3, unique=True)
    out = []
    for sequence in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, 9))
        for chosen in draw(st.lists(experts, min_size=1, max_size=40)):
            out.append(Token(sequence, position, tuple(chosen)))
            position += draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2, 5]))
    return out


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


@settings(deadline=None, max_examples=60)
@given(some_tokens())
def test_values_are_those_of_loops(tokens: list[Token]) -> None:
    pairs = [
        (set(a.experts), set(b.experts), a.experts[:1], b.experts[:1])
        for a in tokens
        for b in tokens
        if a.sequence == b.sequence and b.position == a.position + 1
    ]
    at = {(t.sequence, t.position): set(t.experts) for t in tokens}

    def window(length: int) -> float:
        runs = [[at.get((s, p + i)) for i in range(length)] for s, p in at]
        full = [[x for x in run if x is not None] for run in runs]
        return mean([len(set().union(*run)) for run in full if len(run) == length])

    made = sum(len(b) for _, b, _, _ in pairs)
    wanted = {
        "repeated_first": mean([a == b for _, _, a, b in pairs if a and b]),
        "repeated_any": mean([bool(a & b) for a, b, _, _ in pairs]),
        "overlap": sum(len(a & b) for a, b, _, _ in pairs) / made if made else float("nan"),
        "overlap_jaccard": mean([len(a & b) / len(a | b) for a, b, _, _ in pairs if a | b]),
        "working_set_4": window(4),
        "working_set_32": window(32),
    }
    assert set(wanted) == set(MEASURES)
    result = sequences_of(tokens, EXPERTS, 3).found
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value, nan_ok=True), name


@settings(deadline=None)
@given(some_tokens(), st.integers(1, 12))
def test_tokens_at_a_distance_are_those_of_a_loop(tokens: list[Token], lag: int) -> None:
    given = sequences_of(tokens, EXPERTS, 3)
    wanted = [
        (m, n)
        for (m, a), (n, b) in product(enumerate(tokens), repeat=2)
        if a.sequence == b.sequence and b.position == a.position + lag
    ]
    assert list(zip(*(x.tolist() for x in given.follow(lag)), strict=True)) == wanted
    rows = overlap_by_lag(given, (lag,))
    assert len(rows) == (len(wanted) > 0)
    if wanted:
        shared = sum(len({*tokens[m].experts} & {*tokens[n].experts}) for m, n in wanted)
        made = sum(len(tokens[n].experts) for _, n in wanted)
        assert rows["pairs"][0] == len(wanted)
        share = shared / made if made else float("nan")
        assert rows["overlap"][0] == pytest.approx(share, nan_ok=True)


def test_nothing_crosses_the_boundary_of_a_sequence() -> None:
    """Each sequence keeps to an expert of its own; as one sequence the third pair differs."""
    ids = np.array([[0], [0], [0], [1], [1], [1]])
    position = np.array([0, 1, 2, 3, 4, 5])
    apart = Sequences(ids, np.array([0, 0, 0, 1, 1, 1]), position, 4)
    joined = Sequences(ids, np.zeros(6, np.int64), position, 4)
    gap = Sequences(ids, np.zeros(6, np.int64), np.array([0, 1, 2, 4, 5, 6]), 4)
    for name in ("repeated_first", "repeated_any", "overlap", "overlap_jaccard"):
        assert apart.found[name] == 1
        assert gap.found[name] == 1
        assert joined.found[name] == 0.8
    assert np.isnan(apart.found["working_set_4"])
    assert joined.found["working_set_4"] == 2


def test_uniform_routers_have_known_values() -> None:
    """Mixtral table 5: 12.5 % and 46.4 %; others by its second formula."""
    assert uniform(8, 2)["repeated_first"] == 0.125
    for experts, top_k, share in ((8, 2, 0.464), (16, 4, 0.728), (64, 6, 0.460),
                                  (64, 8, 0.679), (128, 8, 0.412), (256, 8, 0.227)):  # fmt: skip
        assert uniform(experts, top_k)["repeated_any"] == pytest.approx(share, abs=5e-4)
        assert uniform(experts, top_k)["overlap"] == top_k / experts
    for experts, jaccard in ((64, 0.0705), (128, 0.0343), (256, 0.0169)):
        found_ = uniform(experts, 8)["overlap_jaccard"]
        assert found_ == pytest.approx(jaccard, abs=5e-5)
        assert f"{jaccard}" in METRICS["overlap_jaccard"].null
    assert uniform(4, 4) == {
        "repeated_first": 0.25, "repeated_any": 1, "overlap": 1, "overlap_jaccard": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (5, 3)])
def test_closed_forms_are_those_of_all_sets(experts: int, top_k: int) -> None:
    sets = [set(s) for s in combinations(range(experts), top_k)]
    pairs = list(product(sets, sets))
    wanted = uniform(experts, top_k)
    assert wanted["repeated_any"] == pytest.approx(mean([bool(a & b) for a, b in pairs]))
    assert wanted["overlap"] == pytest.approx(mean([len(a & b) / top_k for a, b in pairs]))
    assert wanted["overlap_jaccard"] == pytest.approx(
        mean([len(a & b) / len(a | b) for a, b in pairs])
    )


def test_a_uniform_router_shows_them() -> None:
    """Means over 20 seeds, within three standard errors."""
    runs = [random(8, 64, 32, 2, seed).found for seed in range(20)]
    wanted = uniform(32, 2) | {
        f"working_set_{tau}": float(working_set.by_chance(32, 2, tau)) for tau in (4, 32)
    }
    for name in MEASURES:
        values = np.array([run[name] for run in runs])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert values.mean() == pytest.approx(wanted[name], abs=3 * error), name


def test_expectations_are_means_over_all_orders() -> None:
    """Of few tokens, every pair and every window counted."""
    sets = [{0, 1}, {0, 2}, {0}, {0, 1, 3}, {2, 3}, {1}]
    n = np.array([sum(e in s for s in sets) for e in range(5)])
    pairs = [(a, b) for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j]
    shared = sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)
    assert repeated(n, 6) == pytest.approx(shared)
    for window in range(1, 7):
        unions = [len(set().union(*some)) for some in combinations(sets, window)]
        assert touched(n, 6, window) == pytest.approx(mean([float(x) for x in unions]))
    assert touched(n, 6, 100) == touched(n, 6, 6) == 4
    many = np.full(64, 1_000_000)
    for tau in (1, 4, 16, 64):
        uniform_ = float(working_set.by_chance(64, 8, tau))
        assert touched(many, 8_000_000, tau) == pytest.approx(uniform_, rel=1e-5)
    # Skewed loads: sum of F_i^2 / k, and of f_i^2 for one choice.
    loads = np.array([600_000, 300_000, 100_000])
    assert repeated(loads, 1_000_000) == pytest.approx(0.36 + 0.09 + 0.01, abs=1e-5)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_draws_are_around_the_closed_forms(skew: float) -> None:
    given = random(6, 64, 16, 3, 0, skew)
    for name, result in found(given).items():
        if name.startswith("prefix") or name in ("repeated_any", "overlap_jaccard"):
            continue
        draws = given.drawn[name]
        error = draws.std() / np.sqrt(len(draws))
        assert result.chance is not None
        assert draws.mean() == pytest.approx(result.chance.expected, abs=4 * error), name
        assert (result.chance.low, result.chance.high) == (draws.min(), draws.max())
    skewed = uniform(16, 3)["overlap"] * 1.3 < repeated(given.counts_E, len(given))
    assert skewed == (skew > 0)  # loads alone repeat experts


def test_the_stored_question_has_the_same_share(tmp_path: Path) -> None:
    spec = Spec(
        layers=1, experts=12, top_k=3, topics=4, topic_strength=1.0, planted=(Hot(2, share=0.8),)
    )
    known = layer_of(spec, tmp_path / "run", "locality")
    with open_trace(tmp_path / "run") as trace:
        (row,) = trace.query("repetition", most=None).rows()
    result = measure(METRICS["overlap"], known)
    assert result.chance is not None
    assert result.value == pytest.approx(row["repeated_share"])
    assert known.sequences is not None
    assert row["pairs"] == len(known.sequences.follow()[0])
    # Of a token with itself too: one in so many pairs.
    n = len(known.sequences)
    assert result.chance.expected == pytest.approx(row["chance"], abs=2 / n)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_planted_is_within_the_null(tmp_path: Path, seed: int) -> None:
    """Also where loads are skewed, and where each token has a topic of its own."""
    spec = Spec(
        layers=1, popularity="zipf", topics=5, topic_strength=1.0, stay=0.0, seed=seed,
        experts=16, top_k=4,
    )  # fmt: skip
    known = layer_of(spec, tmp_path / "run", "locality")
    assert [measure(METRICS[name], known).beyond for name in NAMES] == [""] * len(NAMES)


def test_topics_that_stay_are_found(tmp_path: Path) -> None:
    values = []
    for stay in (0.5, 0.95):
        spec = Spec(layers=1, topics=6, topic_strength=1.5, stay=stay, experts=32, top_k=4, seed=3)
        known = layer_of(spec, tmp_path / f"{stay}", "locality")
        result = {name: measure(METRICS[name], known) for name in NAMES}
        values.append(result)
        for name in MEASURES:
            assert result[name].beyond == ("low" if name.startswith("working") else "high"), name
        assert known.sequences is not None
        curve = overlap_by_lag(known.sequences)["overlap"].to_list()
        assert curve[0] == pytest.approx(result["overlap"].value)
        assert curve[0] > curve[2] > curve[4]  # forgotten after 16 tokens rather than 1
    assert values[1]["overlap"].value > values[0]["overlap"].value
    assert values[1]["prefix_recall"].beyond == "high"


def test_prefixes_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    lengths, experts, top_k = [2 * PREFIX, 25, 2 * PREFIX - 1, 40, 19], 12, 2
    tokens = [
        Token(s, 3 * p, tuple(rng.choice(experts - s, top_k, replace=False).tolist()))
        for s, length in enumerate(lengths)
        for p in range(length)
    ]
    of = {s: [t.experts for t in tokens if t.sequence == s] for s in (0, 1, 3, 4)}
    first = {s: Counter(e for x in xs[: len(xs) // 2] for e in x) for s, xs in of.items()}
    rest = {s: Counter(e for x in xs[len(xs) // 2 :] for e in x) for s, xs in of.items()}

    def others(s: int) -> Counter[int]:
        return sum((c for t, c in first.items() if t != s), Counter())

    def top(*scores: Counter[int]) -> list[int]:
        return sorted(range(experts), key=lambda e: (*(-c[e] for c in scores), e))[: 2 * top_k]

    total = sum(c.total() for c in rest.values())
    own = sum(rest[s][e] for s in of for e in top(first[s], others(s))) / total
    popular = sum(rest[s][e] for s in of for e in top(others(s))) / total
    any_ = sum(rest[s][e] for s in of for t in of for e in top(first[t], others(t)))
    result = found(sequences_of(tokens, experts, top_k))
    assert result["prefix_recall"].value == pytest.approx(own)
    assert result["prefix_gain"].value == pytest.approx(own - popular)
    chance = result["prefix_recall"].chance
    assert chance is not None
    assert chance.expected == pytest.approx(any_ / 4 / total)


def test_a_sequence_with_experts_of_its_own_is_worth_a_prefix() -> None:
    rng = np.random.default_rng(1)
    own = rng.permuted(np.tile(np.arange(16), (12, 1)), axis=1)[:, :4]
    ids = np.concatenate([[rng.choice(x, 2, replace=False) for _ in range(40)] for x in own])
    given = Sequences(ids, np.arange(480) // 40, np.arange(480) % 40, 16)
    result = found(given)
    assert result["prefix_recall"].value == 1
    assert result["prefix_gain"].value > 0.5
    assert {result[x].beyond for x in ("prefix_recall", "prefix_gain")} == {"high"}
    # Of a router without memory a short prefix says less than what is popular.
    noise = found(random(12, 16, 32, 2, 0, skew=1.0))
    assert noise["prefix_recall"].beyond == ""
    assert noise["prefix_gain"].value < 0


NOTHING = np.empty(0, np.int64)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (Sequences(np.empty((0, 2), np.int64), NOTHING, NOTHING, 8), NAMES),
        (sequences_of([Token(0, 0, (1, 2))], 8, 2), NAMES),
        (sequences_of([Token(s, 0, (1, 2)) for s in range(9)], 8, 2), NAMES),
        (sequences_of([Token(0, p, ()) for p in range(3)], 8, 0), [*NAMES[:1], *NAMES[4:]]),
        (random(1, 40, 8, 2, 0), ["prefix_recall", "prefix_gain"]),
        (random(3, 40, 8, 4, 0), ["prefix_recall", "prefix_gain"]),
        (random(30, 3, 8, 2, 0), NAMES[4:]),
    ],
)
def test_without_neighbours_there_is_no_number(given: Sequences, names: list[str]) -> None:
    for name, result in found(given).items():
        if name in names:
            assert np.isnan(result.value), name
            assert result.lacks
        elif given.ids_NK.shape[1]:
            assert not result.lacks, name


def test_reasons_are_given(tmp_path: Path) -> None:
    spec = Spec(layers=1, steps=1, sequences=3, length=3)
    known = layer_of(spec, tmp_path / "run", "locality")
    lacks = {name: measure(METRICS[name], known).lacks for name in NAMES}
    assert lacks["overlap"] == ""
    assert lacks["working_set_32"] == "no 32 tokens in a row in one sequence"
    assert lacks["prefix_gain"].startswith("fewer than two sequences of 16 tokens")


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4), (128, 2)])
def test_extremes(experts: int, top_k: int) -> None:
    result = found(random(3, 40, experts, top_k, 0))
    if experts == top_k:
        assert result["overlap"].value == result["overlap_jaccard"].value == 1
        assert result["working_set_32"].value == experts
    assert all(result[name].beyond == "" for name in MEASURES)
