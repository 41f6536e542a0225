"""What experts are chosen for: what was planted is found, and nothing where nothing was."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.metrics import specialisation
from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.evidence import Evidence
from moe_lens.queries.evidence import evidence
from moe_lens.queries.session import one_run, open_trace
from moe_lens.trace.synthetic import Committee, Spec, Specialist, generate

GROUP = [m for m in metrics().values() if m.group == "specialisation"]
BY_TAG = ("domain_information", "domain_information_norm", "domain_lift", "domain_divergence")


def found(known: Evidence, name: str) -> Measured:
    return measure(METRICS[name], known)


def texts(
    seed: int, sequences: int = 48, length: int = 40, experts: int = 8, k: int = 2, tags: int = 3,
    of_tag: float = 0.0, of_text: float = 1.0, of_id: float = 0.0, of_place: float = 0.0,
) -> Evidence:  # fmt: skip
    """Texts that each have likings of their own, and what tag, ids and places add to them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(length // 2, length, sequences)
    sequence_N = np.repeat(np.arange(sequences), sizes)
    position_N = np.concatenate([np.arange(n) for n in sizes])
    tag_N = rng.permutation(np.arange(sequences) % tags)[sequence_N]
    token_id_N = (rng.pareto(1.0, len(sequence_N)) * 5).astype(np.int64) % 40
    z = rng.gumbel(size=(len(sequence_N), experts))
    z += of_text * rng.normal(size=(sequences, experts))[sequence_N]
    z += of_tag * rng.normal(size=(tags, experts))[tag_N]
    z += of_id * rng.normal(size=(40, experts))[token_id_N]
    z += of_place * (position_N < 4)[:, None] * rng.normal(size=experts)
    return told(np.argsort(-z, axis=1)[:, :k], sequence_N, position_N, tag_N, token_id_N, experts)


def told(
    ids_NK: np.ndarray, sequence_N: np.ndarray, position_N: np.ndarray, tag_N: np.ndarray,
    token_id_N: np.ndarray, experts: int,
) -> Evidence:  # fmt: skip
    tags = int(tag_N.max(initial=0)) + 1
    counts_GE = np.zeros((tags, experts), np.int64)
    for g, row in zip(tag_N, ids_NK, strict=True):
        for e in row:
            if e >= 0:
                counts_GE[g, e] += 1
    several = len(set(tag_N.tolist())) > 1
    return Evidence(
        experts=experts, outputs=experts, top_k=ids_NK.shape[1], tokens=len(ids_NK),
        ids_NK=ids_NK, sequence_N=sequence_N, position_N=position_N, token_id_N=token_id_N,
        tag_N=tag_N if several else None,
        tags=tuple(f"tag {g}" for g in range(tags)) if several else None,
        counts_GE=counts_GE if several else None,
        tokens_G=np.bincount(tag_N, minlength=tags) if several else None,
        why=specialisation.UNDEFINED,
    )  # fmt: skip


def generated(folder: Path, **spec: Any) -> Evidence:
    path = folder / "trace"
    generate(path, Spec(**{"layers": 1, "experts": 16, "top_k": 2, "steps": 8, **spec}))
    with open_trace(path) as trace:
        run = one_run(trace)
        return evidence(trace, run, run.layers[0], "train", GROUP)


# Against loops ------------------------------------------------------------------------------------


def _tag_loop(known: Evidence) -> dict[str, float]:
    """The numbers of tags, choice by choice."""
    assert known.ids_NK is not None
    assert known.tag_N is not None
    pairs = [
        (int(g), int(e))
        for g, row in zip(known.tag_N, known.ids_NK, strict=True)
        for e in row
        if e >= 0
    ]
    n = len(pairs)
    joint, tag, expert = Counter(pairs), Counter(g for g, _ in pairs), Counter(e for _, e in pairs)
    information = sum(c / n * math.log(c * n / tag[g] / expert[e]) for (g, e), c in joint.items())
    entropy = {
        name: -sum(c / n * math.log(c / n) for c in of.values())
        for name, of in (("tag", tag), ("expert", expert))
    }
    lift = max(
        joint[g, e] * n / tag[g] / expert[e]
        for g in tag
        for e in expert
        if tag[g] * expert[e] / n >= 10
    )
    apart, normed, overlap = [], [], []
    profile = {g: [joint[g, e] / tag[g] for e in range(known.experts)] for g in tag}
    lead = {}
    for g in tag:
        chosen: list[int] = []
        for e in sorted(range(known.experts), key=lambda e: -joint[g, e]):
            if (
                sum(joint[g, x] for x in chosen) * 2 >= tag[g]
                and joint[g, e] < joint[g, chosen[-1]]
            ):
                break
            chosen.append(e)
        lead[g] = set(chosen)

    def h(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x)

    for g in tag:
        for other in tag:
            if g < other:
                p, q = profile[g], profile[other]
                own = (h(p) + h(q)) / 2
                jsd = h([(a + b) / 2 for a, b in zip(p, q, strict=True)]) - own
                apart.append(jsd)
                normed.append(jsd / (math.log(known.experts) - own))
                overlap.append(len(lead[g] & lead[other]) / len(lead[g] | lead[other]))
    return {
        "domain_information": information,
        "domain_information_norm": information / min(entropy.values()),
        "domain_lift": lift,
        "domain_divergence": float(np.mean(apart)),
        "domain_divergence_norm": float(np.mean(normed)),
        "committee_overlap": float(np.mean(overlap)),
    }


@pytest.mark.parametrize("seed", range(4))
def test_numbers_of_tags_are_those_of_a_loop(seed: int) -> None:
    known = texts(seed, of_tag=0.5, k=1 + seed % 3, tags=3 + seed * 2, experts=8 - seed)
    assert known.ids_NK is not None
    known.ids_NK[::7, -1] = -1  # chose fewer
    for name, wanted in _tag_loop(known).items():
        assert found(known, name).value == pytest.approx(wanted, rel=1e-9), name


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_every_token_are_read_as_they_are(seed: int) -> None:
    known = texts(seed, of_tag=0.3, of_text=0.2)
    counts, tokens = known.counts_GE, known.tokens_G
    assert counts is not None
    assert tokens is not None
    most = max(counts[g, e] / tokens[g] for g in range(3) for e in range(8))
    assert found(known, "domain_specialisation").value == pytest.approx(most)
    in_all = set(range(8))
    for row in counts:
        ranked = sorted(range(8), key=lambda e: -row[e])
        size = next(m for m in range(1, 9) if 2 * sum(row[e] for e in ranked[:m]) >= row.sum())
        in_all &= {e for e in range(8) if row[e] >= row[ranked[size - 1]]}
    share = min(sum(row[e] for e in in_all) / row.sum() for row in counts)
    assert found(known, "committee_size").value == len(in_all)
    assert found(known, "committee_share").value == pytest.approx(share)


@pytest.mark.parametrize("seed", range(3))
def test_position_information_is_that_of_a_loop(seed: int) -> None:
    known = texts(seed, of_place=2.0)
    assert known.ids_NK is not None
    assert known.position_N is not None
    pairs = [
        (int(p).bit_length(), int(e))
        for p, row in zip(known.position_N, known.ids_NK, strict=True)
        for e in row
    ]
    n, joint = len(pairs), Counter(pairs)
    place, expert = Counter(b for b, _ in pairs), Counter(e for _, e in pairs)
    wanted = sum(c / n * math.log(c * n / place[b] / expert[e]) for (b, e), c in joint.items())
    got = found(known, "position_information")
    assert got.value == pytest.approx(wanted)
    assert got.beyond == "high"


def test_metrics_of_ids_are_those_of_the_table() -> None:
    known = texts(0, of_id=1.0)
    table = known.of_ids
    assert table is not None
    assert found(known, "vocabulary_specialisation").value == table.max_share[0]
    assert found(known, "same_token_agreement").value == table.agreement[0]
    bias = table.information[1:].mean()
    wanted = (table.information[0] - bias) / (table.most - bias)
    got = found(known, "context_independence")
    assert got.value == pytest.approx(wanted)
    assert got.beyond == "high"
    assert got.chance is not None
    assert got.chance.expected == 0
    given_ids = known.given_ids_R
    assert given_ids is not None
    beyond = found(known, "domain_information_given_token")
    assert beyond.value == given_ids[0]
    assert beyond.chance is not None
    assert beyond.chance.low is None
    assert beyond.chance.high == given_ids[1:].max()


# What was planted ---------------------------------------------------------------------------------


def test_a_specialist_is_found_with_its_lift(tmp_path: Path) -> None:
    known = generated(tmp_path, planted=(Specialist(2, "code", lift=3.0),))
    lift = found(known, "domain_lift")
    # 1,000 tokens of code, of which 3/8 choose the expert: a standard deviation of 4 %.
    assert lift.value == pytest.approx(3.0, abs=0.4)
    assert lift.beyond == "high"
    assert found(known, "domain_information").beyond == "high"
    assert found(known, "domain_specialisation").value == pytest.approx(3 / 8, abs=0.06)


def test_a_committee_is_found_in_every_domain(tmp_path: Path) -> None:
    known = generated(tmp_path, planted=(Committee((1, 5, 9), share=0.6),))
    share = found(known, "committee_share")
    # Its three members have .2 each: two of them are not yet half of the choices.
    assert found(known, "committee_size").value == 3
    assert share.value == pytest.approx(0.6, abs=0.04)
    assert share.beyond == "high"
    assert found(known, "committee_overlap").value == 1
    for name in BY_TAG:
        assert found(known, name).beyond == "", name


def test_domains_are_found_where_they_matter(tmp_path: Path) -> None:
    known = generated(tmp_path, domain_strength=0.5)
    for name in (*BY_TAG, "domain_divergence_norm", "domain_information_given_token"):
        assert found(known, name).beyond == "high", name
    assert found(known, "committee_overlap").beyond == "low"
    assert found(known, "context_independence").value < 0.1  # of what domains' words give away


def test_nothing_is_found_where_nothing_was_planted(tmp_path: Path) -> None:
    """Sticky topics make texts differ, and no domain has a part in that."""
    known = generated(tmp_path, topics=3, topic_strength=1.0)
    names = {m.name for m in GROUP} - {"domain_specialisation", "committee_size", "committee_share"}
    for name in names:
        assert not found(known, name).beyond, name
    assert found(known, "context_independence").value == pytest.approx(0, abs=0.02)


def test_a_lookup_table_is_context_independent(tmp_path: Path) -> None:
    known = generated(tmp_path, context_independence=1.0)
    for name in ("context_independence", "same_token_agreement", "vocabulary_specialisation"):
        got = found(known, name)
        assert got.value == pytest.approx(1.0, abs=1e-9), name
        assert got.beyond == "high", name
    # Domains have other words, so the tag tells of the expert, and nothing beyond the word.
    assert found(known, "domain_information").beyond == "high"
    beyond = found(known, "domain_information_given_token")
    assert beyond.value == pytest.approx(0, abs=1e-12)
    assert not beyond.beyond


def test_counts_are_of_every_token(tmp_path: Path) -> None:
    known = generated(tmp_path, planted=(Specialist(2, "code", lift=3.0),))
    assert known.counts_GE is not None
    assert known.tokens_G is not None
    assert known.counts_GE.shape == (4, 16)
    assert known.tokens_G.sum() == 8 * 8 * 64
    assert known.counts_GE.sum(1).tolist() == (2 * known.tokens_G).tolist()
    assert known.tagged_GE is not None
    assert known.tagged_GE.tolist() == known.counts_GE.tolist()  # all tokens are few enough


def test_counts_alone_give_what_needs_no_rows(tmp_path: Path) -> None:
    known = generated(tmp_path, rows=False)
    assert not found(known, "domain_specialisation").lacks
    assert not found(known, "committee_size").lacks
    for name in (*BY_TAG, "position_information", "same_token_agreement"):
        assert "tokens=1.0" in found(known, name).lacks, name


# The null -----------------------------------------------------------------------------------------


def test_texts_that_differ_are_no_domains() -> None:
    """A test that takes tokens for independent finds domains in nearly all of these."""
    beyond: dict[str, int] = defaultdict(int)
    careless = 0
    for seed in range(40):
        known = texts(seed, sequences=24)
        for name in (*BY_TAG, "committee_overlap", "position_information", "context_independence",
                     "domain_information_given_token", "same_token_agreement",
                     "vocabulary_specialisation"):  # fmt: skip
            beyond[name] += bool(found(known, name).beyond)
        # 2 n I is chi-squared of (G - 1)(E - 1) = 14, if choices were independent; 29.1 is 99 %.
        assert known.ids_NK is not None
        careless += 2 * known.ids_NK.size * found(known, "domain_information").value > 29.1
    assert careless > 35
    # By chance 1 % of 40: three or more of one metric in 8 of 1,000.
    assert max(beyond.values()) <= 2, dict(beyond)


def test_of_independent_tokens_chance_is_the_known_bias() -> None:
    """One token a text, 5 tags, 64 experts, n = 2000: (D - 1)(E - 1) / 2n = .063, and a little."""
    means = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        n = 2000
        known = told(
            rng.integers(0, 64, (n, 1)), np.arange(n), np.zeros(n, np.int64), rng.integers(0, 5, n),
            np.zeros(n, np.int64), 64,
        )  # fmt: skip
        got = found(known, "domain_information")
        assert got.beyond == ""
        assert got.chance is not None
        means.append(got.chance.expected)
    # One draw has a standard deviation of .006, and a permutation knows the counts of its own.
    assert np.mean(means) == pytest.approx(0.06485, abs=0.002)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(8)))
def test_names_of_experts_do_not_matter(seed: int, order: list[int]) -> None:
    known = texts(seed, of_tag=0.5, of_id=0.5, sequences=12)
    assert known.ids_NK is not None
    assert known.counts_GE is not None
    assert known.sequence_N is not None
    assert known.position_N is not None
    assert known.tag_N is not None
    assert known.token_id_N is not None
    renamed = told(
        np.array(order)[known.ids_NK], known.sequence_N, known.position_N, known.tag_N,
        known.token_id_N, 8,
    )  # fmt: skip
    for metric in GROUP:
        one, other = measure(metric, known), measure(metric, renamed)
        assert one.value == pytest.approx(other.value, rel=1e-9, abs=1e-12, nan_ok=True)
        if not metric.name.startswith(("domain_specialisation", "committee_s")):  # drawn, not moved
            assert one.chance is None or other.chance is not None
            if one.chance is not None and other.chance is not None:
                assert one.chance.expected == pytest.approx(other.chance.expected, abs=1e-9)


# Little or nothing --------------------------------------------------------------------------------


def test_a_tag_seen_once_changes_little() -> None:
    known = texts(1, of_tag=1.5, tags=2)
    arrays = {
        name: np.append(getattr(known, name), extra)
        for name, extra in (("sequence_N", 999), ("position_N", 0), ("tag_N", 2), ("token_id_N", 1))
    }
    assert known.ids_NK is not None
    more = told(np.vstack([known.ids_NK, [[0, 1]]]), **arrays, experts=8)
    for name in ("domain_divergence", "committee_size", "committee_share", "domain_specialisation"):
        assert found(more, name).value == found(known, name).value, name
    assert found(more, "domain_lift").value == pytest.approx(
        found(known, "domain_lift").value, rel=0.05
    )
    assert found(more, "domain_information").beyond == "high"


def test_one_tag_is_said() -> None:
    known = texts(0, tags=1)
    for name in (*BY_TAG, "committee_size", "domain_specialisation"):
        assert found(known, name).lacks == "fewer than two tags", name
    assert not found(known, "vocabulary_specialisation").lacks


def test_without_token_ids_it_is_said() -> None:
    known = texts(0)
    fields = {k: v for k, v in vars(known).items() if k in Evidence.__dataclass_fields__}
    without = Evidence(**{**fields, "token_id_N": None})
    for name in ("context_independence", "domain_information_given_token"):
        assert "token_ids=True" in found(without, name).lacks, name


def test_one_expert_or_all_of_them() -> None:
    for known in (texts(0, experts=1, k=1), texts(0, experts=4, k=4)):
        for name in BY_TAG[::2]:
            assert found(known, name).beyond == ""
        assert found(known, "domain_information").value == pytest.approx(0, abs=1e-12)
        assert found(known, "domain_divergence_norm").value == pytest.approx(0, abs=1e-6)
        assert found(known, "position_information").value == pytest.approx(0, abs=1e-12)
        assert "every token chooses every expert" in found(known, "context_independence").lacks
        assert found(known, "vocabulary_specialisation").value == 1
        assert found(known, "committee_size").value == known.experts


def test_one_text_is_no_domain() -> None:
    """Of one text of two tags, or one text a tag, nothing can be beyond chance."""
    for sequences in (2, 3):
        known = texts(0, sequences=sequences, tags=sequences, of_tag=3.0)
        for name in BY_TAG:
            assert found(known, name).beyond == "", name
    one = texts(0, sequences=1, tags=1, length=400, of_id=2.0)
    assert found(one, "context_independence").beyond == "high"  # ids are turned within the text


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_have_no_numbers(tokens: int) -> None:
    nothing = np.zeros(tokens, np.int64)
    known = Evidence(
        experts=4, outputs=4, top_k=2, tokens=tokens, ids_NK=np.zeros((tokens, 2), np.int64),
        sequence_N=nothing, position_N=nothing, tag_N=nothing, tags=("a", "b"), token_id_N=nothing,
        counts_GE=np.zeros((2, 4), np.int64), tokens_G=np.zeros(2, np.int64),
        why=specialisation.UNDEFINED,
    )  # fmt: skip
    for metric in GROUP:
        got = measure(metric, known)
        if metric.name in specialisation.UNDEFINED:
            assert got.lacks == specialisation.UNDEFINED[metric.name], metric.name
        else:
            assert got.lacks or got.value == 0, metric.name
