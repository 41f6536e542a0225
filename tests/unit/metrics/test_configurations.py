"""Which sets of experts are used: known routers, chance, and what is said where too little is."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.metrics.evidence import Evidence

ALL = [m for m in metrics().values() if m.group == "configurations"]
OF_SETS = [m.name for m in ALL if "sets_M" in m.reads]


def known(
    ids_NK: np.ndarray, experts: int, *, limit: tuple[int, int] = (1, 1), top_k: int | None = None
) -> Evidence:
    return Evidence(
        experts=experts, outputs=experts, top_k=ids_NK.shape[1] if top_k is None else top_k,
        tokens=len(ids_NK), counts_E=np.bincount(ids_NK[ids_NK >= 0], minlength=experts),
        ids_NK=ids_NK, group_limit=limit,
    )  # fmt: skip


def found(name: str, given: Evidence) -> Measured:
    return measure(METRICS[name], given)


def value(name: str, given: Evidence) -> float:
    return found(name, given).value


def uniform(tokens: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((tokens, experts)).argsort(1)[:, :top_k]


def test_a_sample_counted_by_hand() -> None:
    ids_NK = np.array([[0, 1], [1, 0], [0, 2], [2, 0], [0, 2], [1, 2], [0, 3], [3, 0]])
    given = known(ids_NK, 4)
    assert value("reachable_bits", given) == pytest.approx(math.log2(6))
    assert value("sparsity", given) == 0.5
    assert value("distinct_sets", given) == 4
    assert value("used_sets", given) == pytest.approx(4 / 6)
    assert value("singleton_sets", given) == 1
    assert value("set_coverage", given) == pytest.approx(7 / 8)
    assert value("chao1_sets", given) == 4
    q = np.array([2, 3, 1, 2]) / 8
    assert value("set_entropy", given) == pytest.approx(-(q * np.log2(q)).sum())
    assert value("effective_sets", given) == pytest.approx(8 * 7 / (2 + 6 + 0 + 2))


def test_a_uniform_router_is_within_chance() -> None:
    """Sixteen experts, four of a token: every number between its draws; no deficit."""
    for seed in range(3):
        given = known(uniform(6000, 16, 4, seed), 16)
        for name in OF_SETS:
            assert found(name, given).beyond == "", name
        deficit = found("independence_deficit", given)
        assert deficit.chance is not None
        # k of E without replacement is less free than E coins: h(1/4) 16 - log2 1820.
        assert deficit.chance.expected == pytest.approx(16 * 0.811278 - 10.829723, abs=0.02)
        assert deficit.value == pytest.approx(deficit.chance.expected, abs=0.03)


def test_bundles_that_the_loads_do_not_show() -> None:
    """Eight pairs of experts, each always together: every expert has the same load."""
    rng = np.random.default_rng(0)
    pairs_N2 = rng.random((6000, 8)).argsort(1)[:, :2]
    ids_NK = np.concatenate([2 * pairs_N2, 2 * pairs_N2 + 1], axis=1)
    given = known(ids_NK, 16)
    assert value("distinct_sets", given) == 28
    assert found("distinct_sets", given).beyond == "low"
    assert value("effective_sets", given) == pytest.approx(28, rel=0.02)
    assert value("set_entropy", given) == pytest.approx(math.log2(28), abs=0.01)
    deficit = found("independence_deficit", given)
    assert deficit.chance is not None
    excess = deficit.value - deficit.chance.expected
    assert excess == pytest.approx(math.log2(1820) - math.log2(28), abs=0.02)


def test_uneven_loads_alone_are_no_deficit() -> None:
    """A conditional Bernoulli router: nothing but its loads and k ties its choices."""
    weights = np.array([8, 4, 2, 1, 1, 1, 0.5, 0.5])
    sets = np.array(list(combinations(range(8), 3)))
    p = weights[sets].prod(1)
    rng = np.random.default_rng(0)
    given = known(sets[rng.choice(len(sets), 8000, p=p / p.sum())], 8)
    deficit = found("independence_deficit", given)
    assert deficit.chance is not None
    assert deficit.value == pytest.approx(deficit.chance.expected, abs=0.02)
    assert found("set_entropy", given).beyond == "low"


def test_a_sample_of_singletons_has_no_entropy() -> None:
    why = {"set_entropy": "too few", "effective_sets": "none twice"}
    ids_NK = uniform(2000, 64, 8)
    given = Evidence(experts=64, outputs=64, top_k=8, ids_NK=ids_NK, group_limit=(1, 1), why=why)
    assert found("set_entropy", given).lacks == "too few"
    for name in ("set_entropy", "set_entropy_chao_shen", "independence_deficit"):
        assert math.isnan(value(name, given))
    assert found("effective_sets", given).lacks == "none twice"
    assert value("distinct_sets", given) == 2000
    # A few sets that come back are enough for the effective number.
    again = known(np.concatenate([ids_NK, ids_NK[:40]]), 64)
    assert math.isnan(value("set_entropy", again))
    assert value("effective_sets", again) == pytest.approx(2040 * 2039 / 80)
    assert found("effective_sets", again).beyond == "low"
    chance = found("effective_sets", again).chance
    assert chance is not None
    assert chance.expected == pytest.approx(4_426_165_368)


def test_a_limit_of_groups_changes_chance() -> None:
    """Pitfall 9: of 2 groups of 4, both choices come from one: 12 sets of 28."""
    rng = np.random.default_rng(0)
    groups_N = rng.integers(0, 2, 4000)[:, None]
    ids_NK = 4 * groups_N + rng.random((4000, 4)).argsort(1)[:, :2]
    limited, free = known(ids_NK, 8, limit=(2, 1)), known(ids_NK, 8)
    assert value("reachable_bits", limited) == pytest.approx(math.log2(12))
    assert value("used_sets", limited) == pytest.approx(1)
    assert found("distinct_sets", limited).beyond == ""
    assert found("set_entropy", limited).beyond == ""
    assert found("distinct_sets", free).beyond == "low"


def test_two_meanings_of_granularity() -> None:
    given = Evidence(experts=64, outputs=64, top_k=8, widths=(2048, 1024))  # OLMoE
    assert value("granularity", given) == 8
    assert "no widths" in found("granularity", known(uniform(9, 4, 2), 4)).lacks


@pytest.mark.parametrize(
    ("ids_NK", "experts"),
    [
        (np.zeros((50, 1), np.int64), 1),  # one expert
        (np.tile([2, 0, 1], (50, 1)), 3),  # k = E
    ],
    ids=["one expert", "all experts"],
)
def test_one_set_there_is(ids_NK: np.ndarray, experts: int) -> None:
    given = known(ids_NK, experts)
    for name, wanted in [
        ("reachable_bits", 0), ("distinct_sets", 1), ("used_sets", 1), ("set_entropy", 0),
        ("set_entropy_chao_shen", 0), ("effective_sets", 1), ("independence_deficit", 0),
        ("sparsity", 1), ("chao1_sets", 1), ("singleton_sets", 0), ("set_coverage", 1),
    ]:  # fmt: skip
        assert value(name, given) == pytest.approx(wanted, abs=1e-9), name
        assert found(name, given).beyond == ""


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    given = known(uniform(tokens, 8, 2), 8)
    assert value("distinct_sets", given) == tokens
    for name in ("set_entropy", "set_entropy_chao_shen", "effective_sets", "independence_deficit"):
        assert math.isnan(value(name, given))


def test_tokens_of_fewer_choices_have_no_chance() -> None:
    """Dynamic k, or zero-compute experts: sets of several sizes are not alike."""
    ids_NK = np.array([[0, 1], [0, -1], [0, -1], [0, 1], [1, -1], [1, -1]])
    given = known(ids_NK, 4)
    assert value("distinct_sets", given) == 3
    assert found("distinct_sets", given).chance is None
    deficit = found("independence_deficit", given)
    assert deficit.lacks == ""
    assert deficit.chance is not None
    assert math.isnan(deficit.chance.expected)
    assert deficit.beyond == ""
    unknown = Evidence(experts=4, outputs=4, ids_NK=ids_NK, group_limit=(1, 1))
    assert "fixed number of choices" in found("reachable_bits", unknown).lacks
    assert value("distinct_sets", unknown) == 3


def test_groups_that_leave_no_set() -> None:
    given = Evidence(experts=8, outputs=8, top_k=5, group_limit=(2, 1))
    assert given.reachable_sets is None
    assert found("reachable_bits", given).lacks
