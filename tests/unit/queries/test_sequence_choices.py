"""`sequence_choices` against a plain loop over generated rows, and the arrays made of it."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn_tokens import drawn, place, valid_tokens
from support.token_rows import EXPERTS, PHASES, TAGS, Knobs, World, decisions, generate

from moe_lens.queries import along
from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.synthetic import Spec
from moe_lens.trace.synthetic import generate as generate_trace

KNOBS = st.builds(
    Knobs,
    seed=st.integers(0, 2**32 - 1),
    forwards=st.integers(0, 3),
    tokens=st.integers(1, 6),
    token_ids=st.booleans(),
    losses=st.sampled_from(["none", "positions", "both"]),
)
ASKED = st.fixed_dictionaries(
    {"layer": st.integers(0, 3), "most": st.sampled_from([None, 1, 3, 6, 1000])},
    optional={
        "first_step": st.integers(0, 3),
        "last_step": st.integers(0, 3),
        "phase": st.sampled_from(PHASES),
        "tag": st.sampled_from(TAGS),
        "rank": st.integers(0, 1),
    },
)


def some_run_on_others(world: World, seed: int) -> None:
    """The library ran other experts than the router chose, for some tokens."""
    rng = random.Random(seed)
    for row in world.rows["routing"]:
        row["router_ids"] = rng.sample(range(EXPERTS), 2) if rng.random() < 0.2 else None


def losses(world: World) -> dict[tuple[int, ...], float]:
    out: dict[tuple[int, ...], float] = {}
    for o in world.visible("outcomes"):
        if o.get("position") is not None and o.get("loss") is not None:
            out[place(o)] = max(o["loss"], out.get(place(o), -math.inf))
    return out


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(knobs=KNOBS, asked=ASKED)
def test_the_rows_are_those_of_a_loop(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    some_run_on_others(world, knobs.seed)
    made = {
        (d["rank"], d["attempt"], d["step"], d["forward"], d["token"]): d
        for d in decisions(world, {"layer": asked["layer"]})
    }
    lost = losses(world) if asked["layer"] >= 2 else {}  # an encoder predicts nothing
    expected = []
    for nth, t in enumerate(drawn(valid_tokens(world, asked), "sequence", asked["most"])):
        d = made.get((t["rank"], t["attempt"], t["step"], t["forward"], t["token"]))
        if d is None:
            continue
        kept = {k: t[k] for k in ("rank", "step", "forward", "sequence", "position", "tag")}
        expected.append(
            {"layer": asked["layer"], "nth": nth, **kept, "token_id": t.get("token_id"),
             "expert_ids": d["expert_ids"], "router_ids": d["router_ids"],
             "weights": d["weights"], "dropped": d["dropped"], "entropy": d["entropy"],
             "margin": d["margin"], "logits": None, "loss": lost.get(place(t))}
        )  # fmt: skip
    layer, asked = asked["layer"], {k: v for k, v in asked.items() if k != "layer"}
    with tempfile.TemporaryDirectory() as folder:
        world.save(Path(folder))
        with open_trace(folder) as trace:
            alone = {"first_layer": layer, "last_layer": layer}
            got = trace.query("sequence_choices", **asked, **alone).rows()
            every = trace.query("sequence_choices", **asked).rows()
    assert got == [row for row in every if row["layer"] == layer]
    for row in got:
        assert row.pop("run") == Path(folder).name
    assert got == expected


def rows(**columns: Any) -> pd.DataFrame:
    n = len(columns["expert_ids"])
    others: dict[str, Any] = {
        "nth": range(n), "rank": 0, "sequence": 0, "position": range(n), "tag": "code",
        "token_id": None, "router_ids": None, "weights": None, "dropped": None, "margin": None,
        "logits": None, "loss": None,
    }  # fmt: skip
    made = {k: [v] * n if not isinstance(v, (list, range)) else v for k, v in others.items()}
    return pd.DataFrame(made | columns)


def of(experts: int, zero: int = 0) -> LayerInfo:
    return LayerInfo(0, "layers.0", experts, 2, zero_experts=zero)


def arrays(*lists: list[float]) -> list[Any]:
    return [np.array(x) for x in lists]


def test_the_largest_weight_comes_first_and_what_computes_nothing_is_no_choice() -> None:
    given = rows(
        expert_ids=arrays([2, 0, 1], [4, 3], []), weights=arrays([0.2, 0.5, 0.3], [0.9, 0.1], [])
    )
    known = along.fields(given, of(4, zero=1))
    assert known["ids_NK"].tolist() == [[0, 1, 2], [3, -1, -1], [-1, -1, -1]]
    assert known["weights_NK"].tolist() == [[0.5, 0.3, 0.2], [0.1, 0, 0], [0, 0, 0]]
    assert "tag_N" not in known
    assert "no router logits" in known["why"]["prob_TV"]


def test_what_is_known_of_some_tokens_alone() -> None:
    given = rows(expert_ids=arrays([1], [0], [1]), weights=arrays([0.5], [0.2], [0.1]),
                 router_ids=[None, np.array([1]), None],
                 sequence=[7, 7, 3], tag=["b", "a", "b"], token_id=[5, 6, None],
                 margin=[0.5, 0.25, 0.0], dropped=[None, np.array([0]), None],
                 loss=[1.5, None, 2.5])  # fmt: skip
    known = along.fields(given, of(2))
    assert known["ids_NK"].tolist() == [[1], [1], [1]]
    assert "weights_NK" not in known
    assert "token_id_N" not in known
    assert known["sequence_N"].tolist() == [0, 0, 1]
    assert (known["tags"], known["tag_N"].tolist()) == (("a", "b"), [1, 0, 1])
    assert known["margin_N"].tolist() == [0.5, 0.25, 0.0]
    assert known["dropped_N"].tolist() == [0, 1, 0]
    assert np.array_equal(known["loss_N"], [1.5, math.nan, 2.5], equal_nan=True)


def test_the_layer_before_has_the_same_tokens_or_none() -> None:
    here = rows(expert_ids=arrays([1], [0]), weights=arrays([1], [1]), nth=[1, 2])
    there = rows(
        expert_ids=arrays([3, 2], [5, 0], [1, 4]), weights=arrays(*[[0.5, 0.5]] * 3), nth=[0, 1, 2]
    )
    assert along.before(here, there, 5)["before_NK"].tolist() == [[0, -1], [1, 4]]
    assert along.before(there, here, 5) == {}
    assert along.before(here, there[:0], 5) == {}


def test_only_the_sequences_that_are_named(tmp_path: Path) -> None:
    """By rank and number, whole: number 1 is not number 10 or 11."""
    generate_trace(tmp_path / "run", Spec(layers=1, sequences=6, length=4, steps=2, ranks=2))
    with open_trace(tmp_path / "run") as trace:
        every = trace.query("sequence_choices", most=None).df()
        named = trace.query("sequence_choices", most=None, sequences="0:1,1:10").df()
    where = list(zip(every["rank"], every["sequence"], strict=True))
    wanted = every[[x in {(0, 1), (1, 10)} for x in where]]
    assert len(wanted) == 8
    columns = ["rank", "sequence", "position", "token_id"]
    assert named[columns].to_numpy().tolist() == wanted[columns].to_numpy().tolist()
    assert named["nth"].tolist() == list(range(8))
