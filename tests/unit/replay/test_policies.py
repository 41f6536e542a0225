"""Policies conserve tokens, and say what they cannot do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.traces import layer_info

from moe_lens.errors import ReplayError, RuntimeInputError
from moe_lens.replay.policies import CAPACITY_FACTOR, Policy, apply, room
from moe_lens.replay.routing import Routed

E = 6
INFO = layer_info(0, experts=E, normalised=True)


def routed(ids: Any, weights: Any = None, **more: Any) -> Routed:
    ids_TK = np.array(ids, np.int32)
    weights_TK = np.full(ids_TK.shape, 0.5) if weights is None else np.array(weights)
    base: dict[str, Any] = {
        "unweighted": 0,
        "dropped_TK": np.zeros(ids_TK.shape, bool),
        "next_ids_TM": None,
        "next_weights_TM": None,
    }
    return Routed(0, 0, 3, 0, "train", ids_TK, weights_TK.astype(np.float32), **(base | more))


@st.composite
def recorded(draw: st.DrawFn) -> Routed:
    tokens, top_k, runners = (
        draw(st.integers(1, 8)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
    )
    order = [draw(st.permutations(range(E))) for _ in range(tokens)]
    weight = st.floats(0.0078125, 1, width=32)
    weights = [[draw(weight) for _ in range(top_k + runners)] for _ in range(tokens)]
    ids_TK = np.array([o[:top_k] for o in order], np.int32)
    gone_TK = np.array([[draw(st.integers(0, 4)) == 0 for _ in range(top_k)] for _ in order])
    weights_T = np.array(weights, np.float32)
    return routed(
        np.where(gone_TK, -1, ids_TK),  # zero experts: they compute nothing
        weights_T[:, :top_k],
        dropped_TK=np.array([[draw(st.booleans()) for _ in range(top_k)] for _ in order]),
        next_ids_TM=np.array([o[top_k : top_k + runners] for o in order], np.int32),
        next_weights_TM=weights_T[:, top_k:],
    )


policies = st.builds(
    Policy,
    st.sampled_from(["recorded", "dropless", "drop", "reroute"]),
    st.floats(0.1, 3),
    st.sampled_from(["position", "prob"]),
    st.sampled_from([None, 1, 2]),
)


@given(recorded(), policies)
def test_tokens_are_conserved(found: Routed, policy: Policy) -> None:
    work = apply(policy, found, INFO)
    top_k = min(policy.top_k or 9, found.expert_ids_TK.shape[1])
    assert work.expert_ids_TK.shape == work.weights_TK.shape == (found.tokens, top_k)
    kept = int((work.expert_ids_TK >= 0).sum())
    assert kept + work.dropped == work.slots <= found.tokens * top_k
    assert 0 <= work.rerouted <= kept
    if policy.top_k is None:
        assert work.slots == (found.expert_ids_TK >= 0).sum()
    if policy.capped:
        load_E = np.bincount(work.expert_ids_TK[work.expert_ids_TK >= 0], minlength=E)
        assert load_E.max(initial=0) <= room(policy, work.slots, E)
    if policy.name == "dropless":
        assert work.dropped == 0
    if policy.name != "reroute":
        assert work.rerouted == 0
    for ids in work.expert_ids_TK.tolist():
        runs = [e for e in ids if e >= 0]
        assert len(set(runs)) == len(runs)


@given(recorded())
def test_enough_room_is_dropless(found: Routed) -> None:
    dropless = apply(Policy("dropless"), found, INFO)
    for name in ("drop", "reroute"):
        work = apply(Policy(name, float(E)), found, INFO)
        assert (work.expert_ids_TK == dropless.expert_ids_TK).all()
        assert (work.weights_TK == dropless.weights_TK).all()


def test_recorded_keeps_what_was_dropped_dropped() -> None:
    found = routed([[0, 1], [0, 2]], dropped_TK=np.array([[False, False], [True, False]]))
    work = apply(Policy(), found, INFO)
    assert work.expert_ids_TK.tolist() == [[0, 1], [-1, 2]]
    assert (work.slots, work.dropped) == (4, 1)
    assert apply(Policy("dropless"), found, INFO).expert_ids_TK.tolist() == [[0, 1], [0, 2]]


def test_drop_by_position_and_by_weight() -> None:
    found = routed([[0, 1], [0, 2], [0, 3]], [[0.2, 0.1], [0.9, 0.1], [0.5, 0.1]])
    # ceil(1 * 6 / 6) = 1 slot an expert
    by_position = apply(Policy("drop", 1.0, "position"), found, INFO)
    assert by_position.expert_ids_TK.tolist() == [[0, 1], [-1, 2], [-1, 3]]
    by_weight = apply(Policy("drop", 1.0, "prob"), found, INFO)
    assert by_weight.expert_ids_TK.tolist() == [[-1, 1], [0, 2], [-1, 3]]
    assert by_weight.dropped == 2


def test_reroute_takes_the_runner_up_and_its_weight() -> None:
    found = routed(
        [[0, 1], [0, 2]],
        [[0.5, 0.25], [0.625, 0.25]],
        next_ids_TM=np.array([[5], [4]], np.int32),
        next_weights_TM=np.array([[0.125], [np.nan]], np.float32),
    )
    work = apply(Policy("reroute", 1.0), found, INFO)
    assert work.expert_ids_TK.tolist() == [[0, 1], [4, 2]]
    assert work.weights_TK.tolist() == [[0.5, 0.25], [0.625, 0.25]]  # its weight is not known
    assert (work.dropped, work.rerouted) == (0, 1)
    known = replace(found, next_weights_TM=np.array([[0.125], [0.0625]], np.float32))
    assert apply(Policy("reroute", 1.0), known, INFO).weights_TK[1, 0] == 0.0625


def test_fewer_choices_are_those_of_the_largest_weights() -> None:
    found = routed(
        [[3, 1, 5], [2, -1, 0]],
        [[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]],
        dropped_TK=np.array([[False, True, False], [False, False, False]]),
    )
    two = apply(Policy("dropless", top_k=2), found, INFO)
    assert two.expert_ids_TK.tolist() == [[3, 1], [2, -1]]  # in their order; a zero expert counts
    assert two.weights_TK == pytest.approx(np.array([[1 / 3, 2 / 3], [1 / 3, 2 / 3]]))
    assert apply(Policy("recorded", top_k=1), found, INFO).expert_ids_TK.tolist() == [[-1], [-1]]
    plain = layer_info(0, experts=E, normalised=False)
    assert apply(Policy("dropless", top_k=1), found, plain).weights_TK.tolist() == [[0.5], [0.5]]


def test_with_fewer_choices_the_others_are_runners_up() -> None:
    work = apply(
        Policy("reroute", 1.0, top_k=1), routed([[0, 1], [0, 2]], [[0.75, 0.25]] * 2), INFO
    )
    assert work.expert_ids_TK.tolist() == [[0], [2]]
    assert work.rerouted == 1


def test_room_is_the_ceiling_of_the_share() -> None:
    assert room(Policy("drop", 1.25), 8192, 64) == 160
    assert room(Policy("drop", 1.0), 9, 4) == 3
    assert room(Policy("drop", 1.1), 40, 1) == 44


def test_refused() -> None:
    found = routed([[0, 1]])
    with pytest.raises(ReplayError, match=r"layer 0, step 3: no runners-up.*tokens=1.0"):
        apply(Policy("reroute", 1.0), found, INFO)
    with pytest.raises(ReplayError, match=r"no recorded gate weights.*--priority position"):
        apply(Policy("drop", 1.0, "prob"), replace(found, unweighted=1), INFO)
    unknown = routed(
        [[0, 1]],
        next_ids_TM=np.array([[2]], np.int32),
        next_weights_TM=np.array([[np.nan]], np.float32),
    )
    with pytest.raises(ReplayError, match="1 runners-up have no recorded weight"):
        apply(Policy("reroute", 1.0, "prob"), unknown, INFO)
    with pytest.raises(RuntimeInputError, match="twice"):
        apply(Policy(), routed([[2, 2]]), INFO)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"name": "nonsense"}, "no policy 'nonsense'"),
        ({"name": "drop", "capacity_factor": 0.0}, "above 0, got 0"),
        ({"name": "drop", "capacity_factor": math.nan}, "above 0, got nan"),
        ({"name": "drop", "by": "luck"}, "not by 'luck'"),
        ({"top_k": 0}, "top_k is 1 or more, got 0"),
    ],
)
def test_what_is_no_policy(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        Policy(**words)


def test_a_capacity_has_a_default_factor() -> None:
    assert Policy("drop").capacity_factor == CAPACITY_FACTOR
    assert Policy("dropless").capacity_factor is None
