"""Placements against the worked examples of those who published the methods, and against laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.balance import balance_of
from moe_lens.replay.placement.methods import METHODS, place
from tests.support.placements import rows_of

EPLB_README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
TENSORRT = np.array([[100, 80, 20, 20, 10, 10, 10, 10]])


def test_the_example_of_eplbs_readme() -> None:
    plan = place("eplb", EPLB_README, (0, 1), ranks=8, replicas=4, nodes=2, groups=4)
    assert plan.slots_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    rows_LR = rows_of(1000 * EPLB_README, plan)  # in thousandths: replicas share evenly
    assert (rows_LR.mean(1) / rows_LR.max(1)).round(4).tolist() == [0.8277, 0.8050]


def test_the_worked_example_of_tensorrt_llm() -> None:
    before = place("contiguous", TENSORRT, (0,), ranks=4)
    assert rows_of(TENSORRT, before).tolist() == [[180, 40, 20, 20]]
    assert balance_of(rows_of(TENSORRT, before)[None]).excess == pytest.approx(1.769, abs=5e-4)
    after = place("eplb", TENSORRT, (0,), ranks=4, replicas=4)
    assert np.bincount(after.slots_LP[0]).tolist() == [3, 3, 1, 1, 1, 1, 1, 1]
    rows_LR = rows_of(3 * TENSORRT, after) / 3
    assert sorted(rows_LR[0].round(1)) == [63.3, 63.3, 63.3, 70.0]
    assert balance_of(rows_of(3 * TENSORRT, after)[None]).excess == pytest.approx(0.077, abs=5e-4)


def test_contiguous_is_the_order_of_numbers() -> None:
    plan = place("contiguous", np.ones((1, 6)), (0,), ranks=4, replicas=2)
    assert plan.slots_LP.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]


@given(st.data())
def test_every_expert_lies_somewhere_and_no_load_is_lost(data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 4, 6]))
    nodes = data.draw(st.sampled_from([n for n in (1, 2, 3) if ranks % n == 0]))
    slots = ranks * data.draw(st.integers(1, 5))
    experts = data.draw(st.integers(1, slots))
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 4) if experts % g == 0]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weights_LE = random.integers(0, 5, (2, experts)) ** data.draw(st.sampled_from([1, 8]))
    together_LEE = random.integers(0, 9, (2, experts, experts))
    for method in METHODS:
        plan = place(
            method,
            weights_LE,
            (0, 1),
            ranks=ranks,
            replicas=slots - experts,
            nodes=nodes,
            groups=groups,
            together_LEE=together_LEE + together_LEE.transpose(0, 2, 1),
        )  # a placement that lacks an expert raises
        rows_LR = rows_of(weights_LE, plan)
        assert (rows_LR.sum(1) == weights_LE.sum(1)).all()


def test_heaviest_first_is_within_four_thirds_of_the_best() -> None:
    """Graham's bound, against every way to place six experts on two ranks."""
    random = np.random.default_rng(0)
    for _ in range(50):
        weights_E = random.integers(1, 100, 6)
        made = place("lpt", weights_E[None], (0,), ranks=2)
        most = rows_of(weights_E[None], made).max()
        halves = ([*map(int, f"{n:06b}")] for n in range(64))
        best = min(
            max(weights_E @ h, weights_E.sum() - weights_E @ h) for h in halves if sum(h) == 3
        )
        assert best <= most <= 4 / 3 * best


def test_groups_stay_on_one_node() -> None:
    random = np.random.default_rng(1)
    weights_LE = random.integers(1, 100, (3, 16))
    plan = place("eplb", weights_LE, (0, 1, 2), ranks=4, replicas=4, nodes=2, groups=4)
    for slots_P in plan.slots_LP:
        nodes = [set(half // 4) for half in slots_P.reshape(2, -1)]
        assert not nodes[0] & nodes[1]


def test_affinity_brings_planted_companions_together_and_stays_even() -> None:
    """Eight groups of four that are always chosen together, numbered in a random order."""
    random = np.random.default_rng(2)
    group_E = random.permutation(np.repeat(np.arange(8), 4))
    together_EE = (group_E[:, None] == group_E).astype(float)
    weights_E = random.integers(90, 110, 32)
    plan = place("affinity", weights_E[None], (0,), ranks=8, together_LEE=together_EE[None])
    pairs = sum(
        together_EE[a, b] for of in plan.slots_LP.reshape(8, 4) for a in of for b in of if a != b
    )
    by_load = place("lpt", weights_E[None], (0,), ranks=8)
    by_chance = sum(
        together_EE[a, b] for of in by_load.slots_LP.reshape(8, 4) for a in of for b in of if a != b
    )
    assert pairs > 0.8 * 8 * 12 > 2 * by_chance
    assert rows_of(weights_E[None], plan).max() <= 1.1 * weights_E.sum() / 8


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"ranks": 3}, "--replicas 1"),
        ({"ranks": 16}, "--replicas 8"),
        ({"ranks": 4, "nodes": 3}, "nodes"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": 4, "replicas": -1}, "every expert needs one slot"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(ReplayError, match=says):
        place("eplb", TENSORRT, (0,), **sizes)


def test_no_such_method_and_affinity_without_rows() -> None:
    with pytest.raises(ReplayError, match="lpt, eplb, affinity"):
        place("best", TENSORRT, (0,), ranks=2)
    with pytest.raises(ReplayError, match="rows per token"):
        place("affinity", TENSORRT, (0,), ranks=2)
