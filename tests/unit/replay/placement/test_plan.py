"""A placement as a value and as a file, and which slot takes which choice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import ReplayError
from moe_lens.replay.placement.balance import rank_rows
from moe_lens.replay.placement.formats import as_format, write_plan
from moe_lens.replay.placement.methods import place
from moe_lens.replay.placement.plan import Placement, read_plan, slots_of
from moe_lens.trace.meta import LayerInfo
from tests.support.placements import counted

SLOTS = np.array([[0, 1, 2, 3, 2, 0]], np.int32)


def naive_slots(ids_TK: np.ndarray, slots_P: np.ndarray) -> list[list[int]]:
    """Replicas in turn, choice by choice."""
    holders = {e: [p for p, held in enumerate(slots_P) if held == e] for e in slots_P}
    turn: Counter[int] = Counter()
    made = []
    for row in ids_TK:
        slots = []
        for e in row.tolist():
            slots.append(-1 if e < 0 else holders[e][turn[e] % len(holders[e])])
            turn[e] += 1
        made.append(slots)
    return made


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(1, 4), st.integers(0, 6))
def test_choices_go_to_replicas_in_turn_and_counts_know_it(
    seed: int, tokens: int, top_k: int, replicas: int
) -> None:
    random = np.random.default_rng(seed)
    experts = 6
    slots_P = random.permutation(np.concatenate([np.arange(6), random.integers(0, 6, replicas)]))
    ids_TK = random.integers(-1, experts, (tokens, top_k)).astype(np.int32)
    slot_TK = slots_of(ids_TK, slots_P.astype(np.int32), experts)
    assert slot_TK.tolist() == naive_slots(ids_TK, slots_P)
    twice_T = np.repeat([0, 1], tokens)  # in another forward turns begin anew
    both = slots_of(np.tile(ids_TK, (2, 1)), slots_P.astype(np.int32), experts, twice_T)
    assert both.tolist() == 2 * slot_TK.tolist()
    rows_E = np.bincount(ids_TK[ids_TK >= 0], minlength=experts)
    plan = Placement("x", len(slots_P), 1, experts, (0,), slots_P[None].astype(np.int32))
    rows_R = rank_rows(counted(rows_E[None, None]), plan)[0, 0]  # a rank for each slot
    assert rows_R.tolist() == np.bincount(slot_TK[slot_TK >= 0], minlength=len(slots_P)).tolist()


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    plan = place("eplb", random.integers(1, 9, (3, 8)), (0, 1, 4), ranks=4, replicas=4, nodes=2)
    path = tmp_path / "deep" / "plan.json"
    write_plan(path, as_format(plan, "moe-lens", []))
    back = read_plan(path)
    assert (back.ranks, back.nodes, back.experts, back.layers) == (4, 2, 8, (0, 1, 4))
    assert back.method == "plan.json"
    assert (back.slots_LP == plan.slots_LP).all()
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "else"}, "not a placement"),
        ({"layers": []}, "not a placement"),
        ({"layers": [{"layer": 0, "slots": [0, 1, 2, 3, 2]}]}, "5 slots"),
        ({"layers": [{"layer": 0, "slots": [0, 1, 2, 3, 2, 4]}]}, "expert 4"),
        ({"layers": [{"layer": 0, "slots": [0, 1, 2, 2, 2, 0]}]}, "no slot for expert 3"),
        ({"layers": 2 * [{"layer": 0, "slots": [0, 1, 2, 3, 2, 0]}]}, "each layer once"),
        ({"ranks": 4}, "6 slots"),
        ({"ranks": "two"}, "not a placement"),
        ({"nodes": 0}, "nodes"),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    said = as_format(Placement("x", 2, 1, 4, (0,), SLOTS), "moe-lens", []) | change
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(said))
    with pytest.raises(ReplayError, match=says):
        read_plan(path)


@pytest.mark.parametrize("text", ["", "[]", "not json", '{"kind": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ReplayError, match="not a placement"):
        read_plan(path)
    with pytest.raises(ReplayError, match="cannot be read"):
        read_plan(tmp_path / "absent.json")


def test_a_plan_of_another_model_is_refused() -> None:
    plan = Placement("x", 2, 1, 4, (0,), SLOTS)
    with pytest.raises(ReplayError, match="another model"):
        plan.of_layer(1, 4)
    with pytest.raises(ReplayError, match="another model"):
        plan.of_layer(0, 8)


def test_the_files_of_engines() -> None:
    plan = Placement("x", 2, 1, 4, (0, 1), np.concatenate([SLOTS, SLOTS[:, ::-1]]))
    infos = [LayerInfo(0, "", 4, 2, block=1), LayerInfo(1, "", 4, 2, block=3)]
    start = [0, 1, 2, 3, 0, 1]
    rows = [[0, 1, 2, 3, 2, 0], [0, 2, 3, 2, 1, 0]]
    of = as_format(plan, "sglang", infos)
    assert of == {"physical_to_logical_map": [start, rows[0], start, rows[1]]}
    assert as_format(plan, "vllm", infos) == {"physical_to_logical_map": rows}
    ascend = as_format(plan, "vllm-ascend", infos)
    assert ascend["moe_layer_count"] == 2
    assert ascend["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [0, 2, 3]},
            {"device_id": 1, "device_expert": [2, 1, 0]},
        ],
    }
    with pytest.raises(ReplayError, match="decoder block"):
        as_format(plan, "sglang", [LayerInfo(0, "", 4, 2), LayerInfo(1, "", 4, 2)])
    with pytest.raises(ReplayError, match="moe-lens, sglang"):
        as_format(plan, "onnx", infos)
