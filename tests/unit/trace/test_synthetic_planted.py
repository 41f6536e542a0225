"""Each thing that a synthetic trace says it holds is found again, by plain counts over its rows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.tables import read

from moe_lens.trace.synthetic import (
    Burst,
    Committee,
    Dead,
    Domain,
    Drift,
    Hot,
    Pair,
    Spec,
    Specialist,
    Truth,
    everything,
    generate,
)

Choices = dict[tuple[int, int, int], frozenset[int]]
"""(step, layer, token) to the experts chosen; each step has one forward here."""


def choices(run: Path) -> Choices:
    rows = read(run, "routing")
    keys = zip(*(rows.column(c).to_pylist() for c in ("step", "layer", "token")), strict=True)
    return {
        k: frozenset(ids)
        for k, ids in zip(keys, rows.column("expert_ids").to_pylist(), strict=True)
    }


def tokens(run: Path) -> dict[tuple[int, int], dict[str, object]]:
    """(step, token) to its row."""
    return {(r["step"], r["token"]): r for r in read(run, "tokens").to_pylist()}


def close(found: float, p: float, n: int) -> bool:
    """Within five standard errors of a share `p` in `n` independent draws."""
    return abs(found - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-12


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth, Choices]:
    """`everything`, and what is in its rows."""
    run = tmp_path_factory.mktemp("synthetic") / "everything"
    truth = generate(run, everything())
    return run, truth, choices(run)


def test_a_hot_expert_has_its_share_and_a_dead_one_nothing(
    fixture: tuple[Path, Truth, Choices],
) -> None:
    _, truth, found = fixture
    for layer in range(truth.spec.layers):
        sets = [s for (_, at, _), s in found.items() if at == layer]
        (hot,), (dead,) = truth.planted(Hot, layer), truth.planted(Dead, layer)
        assert close(sum(hot.expert in s for s in sets) / len(sets), hot.share, len(sets))
        assert not any(dead.expert in s for s in sets)


def test_a_pair_is_chosen_together(fixture: tuple[Path, Truth, Choices]) -> None:
    _, truth, found = fixture
    (pair,) = truth.planted(Pair, 0)
    sets = [s for (_, layer, _), s in found.items() if layer == 0]
    a, b = (sum(e in s for s in sets) for e in (pair.a, pair.b))
    both = sum({pair.a, pair.b} <= s for s in sets)
    share = truth.spec.top_k / truth.spec.experts
    assert close(both / a, pair.together, a)
    assert close(both / b, pair.together, b)
    assert close(a / len(sets), share, len(sets))
    assert close(b / len(sets), share, len(sets))
    assert both * len(sets) / (a * b) == pytest.approx(pair.together / share, rel=0.05)


def test_a_committee_has_its_share_in_every_domain(fixture: tuple[Path, Truth, Choices]) -> None:
    run, truth, found = fixture
    at = tokens(run)
    (committee,) = truth.planted(Committee, 1)
    members, taken, made = set(committee.experts), Counter[object](), Counter[object]()
    for (step, layer, token), s in found.items():
        if layer == 1:
            tag = at[step, token]["tag"]
            taken[tag] += len(s & members)
            made[tag] += len(s)
    assert set(made) == {"code", "prose", "maths", "dialogue"}
    for tag, n in made.items():  # 0.25 of 8 places is two: no part of it is left to chance
        assert taken[tag] / n == committee.share


def test_a_committee_whose_share_is_no_whole_number_of_places(tmp_path: Path) -> None:
    committee = Committee((1, 3, 5, 7), share=0.6)
    generate(tmp_path / "run", Spec(top_k=4, planted=(committee,), steps=16))
    sizes = Counter(len(s & {1, 3, 5, 7}) for s in choices(tmp_path / "run").values())
    assert set(sizes) == {2, 3}
    assert close(sizes[3] / sizes.total(), 0.4, sizes.total())


def test_a_specialist_has_its_lift(fixture: tuple[Path, Truth, Choices]) -> None:
    run, truth, found = fixture
    at = tokens(run)
    (specialist,) = truth.planted(Specialist, 0)
    chosen, seen = Counter[object](), Counter[object]()
    for (step, layer, token), s in found.items():
        if layer == 0:
            tag = at[step, token]["tag"]
            seen[tag] += 1
            chosen[tag] += specialist.expert in s
    share = truth.spec.top_k / truth.spec.experts
    assert close(chosen["maths"] / seen["maths"], specialist.lift * share, seen["maths"])
    others = {t: chosen[t] / seen[t] for t in seen if t != "maths"}
    # What remains: 1 = 0.2 * 3 + 0.8 x, for each of the others.
    for tag, found_share in others.items():
        assert close(found_share, 0.5 * share, seen[tag])


def test_domains_have_their_shares_and_topics_their_stickiness(
    fixture: tuple[Path, Truth, Choices],
) -> None:
    run, truth, _ = fixture
    tags = Counter(r["tag"] for r in read(run, "sequences").to_pylist())
    total = tags.total()
    for tag, share in truth.spec.shares.items():
        # Drawn systematically: at most one sequence a forward is off.
        assert abs(tags[tag] - share * total) <= truth.spec.steps


def same_set_rate(run: Path) -> float:
    """Overlap of neighbours in a sequence: E |S_t and S_t+1| / k."""
    at, found = tokens(run), choices(run)
    by_sequence: dict[tuple[object, int], list[tuple[object, frozenset[int]]]] = defaultdict(list)
    for (step, layer, token), s in found.items():
        row = at[step, token]
        by_sequence[row["sequence"], layer].append((row["position"], s))
    shares = []
    for rows in by_sequence.values():
        ordered = [s for _, s in sorted(rows, key=lambda x: x[0])]  # type: ignore[arg-type,return-value]
        shares += [len(a & b) / len(a) for a, b in pairwise(ordered)]
    return sum(shares) / len(shares)


def test_sticky_topics_raise_repetition(tmp_path: Path) -> None:
    base = {"topics": 8, "topic_strength": 3.0, "steps": 4}
    for name, stay in (("iid", 0.0), ("sticky", 0.95)):
        generate(tmp_path / name, Spec(stay=stay, **base))  # type: ignore[arg-type]
    generate(tmp_path / "none", Spec(steps=4))
    iid, sticky = same_set_rate(tmp_path / "iid"), same_set_rate(tmp_path / "sticky")
    none = same_set_rate(tmp_path / "none")
    assert none == pytest.approx(2 / 16, abs=0.02)  # chance, k / E
    assert sticky > 1.8 * iid


@pytest.mark.parametrize("independence", [0.0, 0.5, 1.0])
def test_context_independence(tmp_path: Path, independence: float) -> None:
    """Same id, same experts: always at 1, as often as different ids at 0."""
    spec = Spec(
        context_independence=independence,
        steps=4,
        topics=4,
        topic_strength=1.0,
        domain_strength=1.0,
    )
    generate(tmp_path / "run", spec)
    at, seen = tokens(tmp_path / "run"), defaultdict(list)
    for (step, layer, token), s in choices(tmp_path / "run").items():
        seen[layer, at[step, token]["token_id"]].append(s)
    pairs = [(a, b) for sets in seen.values() for a, b in pairwise(sets)]
    same = sum(len(a & b) / 2 for a, b in pairs) / len(pairs)
    if independence == 1:
        assert same == 1
        assert len(set().union(*(s for sets in seen.values() for s in sets))) == spec.experts
    elif independence == 0.5:
        assert 0.3 < same < 0.9
    else:
        assert same < 0.3


def test_token_ids_follow_their_domains_law(tmp_path: Path) -> None:
    domains = (Domain("a", vocabulary=50, zipf=1.0), Domain("b", vocabulary=8, zipf=0.0))
    truth = generate(tmp_path / "run", Spec(domains=domains, steps=32, losses=True))
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    for r in read(tmp_path / "run", "tokens").to_pylist():
        seen[r["tag"]][r["token_id"]] += 1
    harmonic = sum(1 / r for r in range(1, 51))
    ranked = seen["a"].most_common()
    n = seen["a"].total()
    assert close(ranked[0][1] / n, 1 / harmonic, n)
    assert close(ranked[1][1] / n, 1 / 2 / harmonic, n)
    assert set(seen["b"]) == set(range(8))
    assert all(close(c / seen["b"].total(), 1 / 8, seen["b"].total()) for c in seen["b"].values())
    losses: dict[str, list[float]] = defaultdict(list)
    for r in read(tmp_path / "run", "slices").to_pylist():
        losses[r["tag"]].append(r["loss_sum"] / r["loss_tokens"])
    assert np.mean(losses["a"]) == pytest.approx(truth.loss_G["a"], abs=0.03)
    assert losses["b"] == pytest.approx([math.log(8)] * 32)
    entropy = sum(math.log(r * harmonic) / (r * harmonic) for r in range(1, 51))
    assert truth.loss_G["a"] == pytest.approx(entropy)


def correlations(counts_FE: np.ndarray) -> tuple[float, float]:
    """(first quarter with last, first eighth with second)."""
    F = len(counts_FE)
    part = [counts_FE[i * F // 8 : (i + 1) * F // 8].sum(0) for i in range(8)]
    ends = np.corrcoef(part[0] + part[1], part[6] + part[7])[0, 1]
    return float(ends), float(np.corrcoef(part[0], part[1])[0, 1])


def written_counts(run: Path, spec: Spec) -> np.ndarray:
    """`[F, L, E]` from the rows, where each step is a forward."""
    out = np.zeros((spec.steps, spec.layers, spec.experts), int)
    for (step, layer, _), s in choices(run).items():
        for e in s:
            out[step, layer, e] += 1
    return out


def test_drift_jumps_at_its_change_point(tmp_path: Path) -> None:
    spec = Spec(popularity="zipf", steps=32, experts=32, drift=Drift((16,)))
    truth = generate(tmp_path / "run", spec)
    assert truth.change_points == (16,)
    counts_FLE = written_counts(tmp_path / "run", spec)
    for layer in range(spec.layers):
        ends, near = correlations(counts_FLE[:, layer])
        assert ends < 0.5
        assert near > 0.95
        before, after = counts_FLE[8:16, layer].sum(0), counts_FLE[16:24, layer].sum(0)
        assert np.corrcoef(before, after)[0, 1] < 0.5
        assert np.corrcoef(before, counts_FLE[:8, layer].sum(0))[0, 1] > 0.95


def test_linear_drift_moves_all_the_time(tmp_path: Path) -> None:
    spec = Spec(popularity="zipf", steps=32, experts=32, drift=Drift((31,), linear=True))
    truth = generate(tmp_path / "run", spec)
    assert truth.change_points == ()
    counts_FLE = written_counts(tmp_path / "run", spec)
    first, last = counts_FLE[:4, 0].sum(0), counts_FLE[-4:, 0].sum(0)
    # In the middle each expert is about half way between what it was and what it will be.
    middle = counts_FLE[14:18, 0].sum(0)
    assert np.corrcoef(first, last)[0, 1] < 0.5
    moved = np.abs(first - last) > 0.1 * first.max()
    assert moved.any()
    between = (middle - first)[moved] / (last - first)[moved]
    assert 0.2 < np.median(between) < 0.8


def test_bursts_come_one_expert_at_a_time(tmp_path: Path) -> None:
    spec = Spec(burst=Burst(share=0.9, every=3), planted=(Dead(3),), steps=45, length=32)
    truth = generate(tmp_path / "run", spec)
    counts_FLE = written_counts(tmp_path / "run", spec)
    n = spec.sequences * spec.length
    for f, layers in enumerate(truth.bursts_FL):
        for layer, expert in enumerate(layers):
            share_E = counts_FLE[f, layer] / n
            if f % 3:
                assert expert == -1
                assert share_E.max() < 0.35
            else:
                assert share_E.argmax() == expert
                assert close(share_E[expert], 0.9, n)
    for turns in truth.bursts_FL[::3].T.tolist():
        assert sorted(turns) == [e for e in range(16) if e != 3]


def test_plants_stay_in_their_layers(tmp_path: Path) -> None:
    spec = Spec(planted=(Dead(0, layers=(1,)), Hot(5, share=0.7, layers=(0,))))
    truth = generate(tmp_path / "run", spec)
    counts_LE = written_counts(tmp_path / "run", spec).sum(0)
    assert counts_LE[1, 0] == 0 < counts_LE[0, 0]
    assert counts_LE[0].argmax() == 5
    assert truth.planted(Hot, 1) == []
    assert close(counts_LE[1, 5] / 4096, 2 / 15, 4096)  # one of 16 is dead there
