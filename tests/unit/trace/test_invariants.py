"""Invariants: each equation is found broken, with its numbers; healthy routing breaks none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import Router, event, seen

from moe_lens.trace.events import Forward, LayerCounts
from moe_lens.trace.invariants import check


def healthy(**more: Any) -> LayerCounts:
    """Ten tokens of two tags, top-2 of four experts, capacity 6: one choice dropped, one moved."""
    fields: dict[str, Any] = {
        "layer": 3,
        "tokens": 10,
        "padding_tokens": 0,
        "tokens_G": np.array([6, 4]),
        "routed_GE": np.array([[5, 4, 1, 2], [3, 2, 2, 1]]),
        "processed_GE": np.array([[4, 4, 1, 2], [2, 2, 2, 1]]),
        "overflowed_GE": np.array([[1, 0, 0, 0], [1, 0, 0, 0]]),
        "dropped_GE": np.array([[1, 0, 0, 0], [0, 0, 0, 0]]),
        "rerouted_in_GE": np.array([[0, 0, 0, 0], [0, 0, 1, 0]]),
        "weight_sum_GE": np.ones((2, 4)),
        "capacity": 6,
        "top_k": 2,
    }
    return LayerCounts(**fields | more)


def forward(*layers: LayerCounts, **more: Any) -> Forward:
    n = len(layers)
    fields: dict[str, Any] = {"fires_expected": n, "fires_seen": n, "layers": list(layers)}
    none = np.zeros(2, np.int64)
    return Forward(17, 2, "train", 0, ["code", "prose"], none, none, **fields | more)


def breaches(x: LayerCounts) -> list[str]:
    found = check(forward(x))
    where = "step 17, forward 2: layer 3: "
    assert all(text.startswith(where) for text in found)
    return [text.removeprefix(where) for text in found]


def test_healthy_counts_break_nothing() -> None:
    assert breaches(healthy()) == []


def change(name: str, at: tuple[int, int], by: int) -> Callable[[LayerCounts], None]:
    def apply(x: LayerCounts) -> None:
        getattr(x, name)[at] += by

    return apply


def assign(**values: Any) -> Callable[[LayerCounts], None]:
    def apply(x: LayerCounts) -> None:
        for name, value in values.items():
            setattr(x, name, value)

    return apply


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (
            change("processed_GE", (0, 1), -1),
            ["expert 1 was chosen 6 times, but computed 5 and overflowed 0 (1 experts disagree)"],
        ),
        (
            change("processed_GE", (1, 3), 2),
            ["expert 3 was chosen 3 times, but computed 5 and overflowed 0 (1 experts disagree)"],
        ),
        (
            change("dropped_GE", (0, 0), 1),
            ["2 choices overflowed, but 2 were dropped and 1 rerouted"],
        ),
        (
            change("rerouted_in_GE", (1, 2), -1),
            ["2 choices overflowed, but 1 were dropped and 0 rerouted"],
        ),
        (assign(tokens_G=np.array([6, 3])), ["10 tokens, but the tags have 9"]),
        (assign(capacity=5), ["an expert computed 6 choices, over its capacity of 5"]),
        (assign(capacity=7), ["expert 0 turned choices away with 6 of 7 slots taken"]),
        (assign(top_k=3), ["10 tokens x top-3 must make 30 choices, but 20 were seen"]),
        (
            assign(padding_tokens=3, padding_GE=np.array([[3, 2, 0, 0], [0, 0, 0, 0]])),
            ["3 padding tokens x top-2 must make 6 choices, but 5 were seen"],
        ),
        (
            assign(padding_tokens=1, padding_GE=None),
            ["1 padding tokens x top-2 must make 2 choices, but 0 were seen"],
        ),
        (
            assign(problems={"ids out of range": 7}),
            ["ids out of range (7)"],
        ),
        (
            assign(weight_sum_GE=np.array([[1, np.nan, 1, 1], [1, np.inf, -np.inf, 1]])),
            ["gate weights of 2 experts are NaN or infinite"],
        ),
    ],
)
def test_a_breach_is_told_with_its_numbers(
    plant: Callable[[LayerCounts], None], says: list[str]
) -> None:
    x = healthy()
    plant(x)
    assert breaches(x) == says


def test_several_experts_that_disagree_are_counted() -> None:
    x = healthy(processed_GE=np.zeros((2, 4), np.int64))
    assert breaches(x)[0] == (
        "expert 0 was chosen 8 times, but computed 0 and overflowed 2 (4 experts disagree)"
    )


def test_experts_are_compared_one_by_one_and_not_in_sum() -> None:
    x = healthy()
    x.processed_GE[0, 1] -= 1
    x.processed_GE[0, 2] += 1
    assert "(2 experts disagree)" in breaches(x)[0]


@pytest.mark.parametrize("silent", [{"overflowed_GE": None}, {"dropped_GE": None}])
def test_an_observation_that_is_missing_counts_as_zero(silent: dict[str, None]) -> None:
    assert breaches(healthy(**silent)) != []


def test_where_every_group_has_its_capacity_the_room_is_theirs_together() -> None:
    assert breaches(healthy(capacity=3, capacity_groups=2)) == []
    assert "over its capacity of 4" in breaches(healthy(capacity=2, capacity_groups=2))[0]
    # An expert may be full in one group and not in the other.
    assert breaches(healthy(capacity=4, capacity_groups=2)) == []


def test_padding_takes_room_too() -> None:
    pads = np.array([[2, 0, 0, 0], [0, 0, 0, 0]])
    assert breaches(healthy(capacity=8, padding_tokens=1, padding_GE=pads)) == []


def test_a_dynamic_k_adds_up_to_nothing_in_particular() -> None:
    assert breaches(healthy(top_k=None)) == []


def chosen_by_experts(**more: Any) -> LayerCounts:
    """Expert choice: each of four experts takes three tokens."""
    counts = np.array([[2, 1, 3, 0], [1, 2, 0, 3]])
    none = {"overflowed_GE": None, "dropped_GE": None, "rerouted_in_GE": None}
    fields: dict[str, Any] = {"expert_choice": True, "capacity": 3, "top_k": None}
    return healthy(**none | fields | {"routed_GE": counts, "processed_GE": counts.copy()} | more)


def test_expert_choice_fills_every_slot() -> None:
    assert breaches(chosen_by_experts()) == []
    (text,) = breaches(chosen_by_experts(capacity=4))
    assert text == "expert choice must fill E x C = 16 slots, but filled 12"
    pads = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert breaches(chosen_by_experts(capacity=4, padding_GE=pads, padding_tokens=2)) == []


def test_a_block_whose_routing_was_not_seen_is_a_breach() -> None:
    assert check(forward(fires_expected=4, fires_seen=3)) == [
        "step 17, forward 2: 4 MoE blocks were entered but the routing of 3 was seen"
    ]
    assert check(forward(healthy(), fires_expected=0)) != []


def test_what_capture_found_wrong_is_passed_on() -> None:
    found = check(forward(problems={"nothing fired": 1, "odd shapes": 5}))
    assert found == [
        "step 17, forward 2: nothing fired",
        "step 17, forward 2: odd shapes (5)",
    ]


def test_every_layer_is_checked() -> None:
    found = check(forward(healthy(), healthy(layer=4, top_k=1), healthy(layer=5, tokens=11)))
    assert [text.split(": ")[1] for text in found] == ["layer 4", "layer 5", "layer 5"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([None, 1, 2, 5]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(0, 2**32),
)
def test_healthy_routing_breaks_nothing(
    experts: int,
    k: int,
    capacity: int | None,
    grouped: bool,
    dynamic: bool,
    padding: float,
    lengths: list[int],
    seed: int,
) -> None:
    router = Router(0, experts, min(k, experts), dynamic, capacity, grouped)
    f = seen([router], lengths=tuple(lengths), padding=padding, nonfinite=0.2, seed=seed)
    assert check(event(f)) == []


REROUTED = {
    # Capacity 2, in order of position: two tokens fill expert 0, a third moves on to expert 1,
    # which then has room for one of the two that chose it; the last is dropped.
    "tokens": 5,
    "tokens_G": np.array([5, 0]),
    "routed_GE": np.array([[3, 2, 0, 0], [0, 0, 0, 0]]),
    "processed_GE": np.array([[2, 1, 0, 0], [0, 0, 0, 0]]),
    "overflowed_GE": np.array([[1, 1, 0, 0], [0, 0, 0, 0]]),
    "dropped_GE": np.array([[0, 1, 0, 0], [0, 0, 0, 0]]),
    "rerouted_in_GE": np.array([[0, 1, 0, 0], [0, 0, 0, 0]]),
    "capacity": 2,
    "top_k": 1,
}


def test_rerouted_choices_take_room_too() -> None:
    assert breaches(healthy(**REROUTED)) == []


def test_rerouting_into_a_full_expert_is_a_breach() -> None:
    over = np.array([[0, 0, 0, 0], [0, 0, 0, 0]])
    over[0, 0] = 1  # expert 0 computes two of its own and one moved here: three, and room for two
    found = breaches(healthy(**REROUTED | {"rerouted_in_GE": over}))
    assert "an expert computed 3 choices, over its capacity of 2" in found


def test_expert_choice_in_each_sequence_fills_every_group() -> None:
    counts = np.array([[3, 3, 3, 3], [3, 3, 3, 3]])
    x = chosen_by_experts(capacity_groups=2, routed_GE=counts, processed_GE=counts.copy())
    assert breaches(x) == []


def test_forwards_side_by_side_are_named_from_the_first_to_the_last() -> None:
    x = forward(healthy(tokens=11), parts=[forward(), forward()])
    x.parts[1].step, x.parts[1].forward = 30, 0
    assert check(x)[0].startswith("step 17, forward 2 to step 30, forward 0: layer 3: 11 tokens")
