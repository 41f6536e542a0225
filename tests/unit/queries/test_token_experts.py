"""`token_experts` against a plain loop over generated rows, and what it draws of long runs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn_tokens import drawn, valid_tokens
from support.token_rows import EXPERTS, PHASES, TAGS, Knobs, decisions, generate
from support.traces import layer_info, meta, segment, write_run

from moe_lens.errors import QueryError
from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta

KNOBS = st.builds(
    Knobs,
    seed=st.integers(0, 2**32 - 1),
    forwards=st.integers(0, 3),
    tokens=st.integers(1, 6),
    token_ids=st.just(False),
    losses=st.sampled_from(["none", "positions"]),
)
ASKED = st.fixed_dictionaries(
    {
        "layer": st.integers(0, 3),
        "by": st.sampled_from(["sequence", "forward"]),
        "most": st.sampled_from([None, 1, 2, 3, 4, 6, 9, 1000]),
    },
    optional={
        "first_step": st.integers(0, 3),
        "last_step": st.integers(0, 3),
        "phase": st.sampled_from(PHASES),
        "tag": st.sampled_from(TAGS),
        "rank": st.integers(0, 1),
    },
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(knobs=KNOBS, asked=ASKED)
def test_the_rows_are_those_of_a_loop(knobs: Knobs, asked: dict[str, Any]) -> None:
    world = generate(knobs)
    made = {
        (d["rank"], d["attempt"], d["step"], d["forward"], d["token"]): d
        for d in decisions(world, {"layer": asked["layer"]})
    }
    expected = []
    for nth, t in enumerate(drawn(valid_tokens(world, asked), asked["by"], asked["most"])):
        d = made.get((t["rank"], t["attempt"], t["step"], t["forward"], t["token"]))
        ran = {e for slot, e in enumerate(d["expert_ids"]) if slot not in d["slots"]} if d else ()
        expected += [
            {"nth": nth, "rank": t["rank"], "sequence": t["sequence"], "tag": t["tag"],
             "position": t["position"], "step": t["step"], "forward": t["forward"], "expert": e}
            for e in sorted(ran)
            if e < EXPERTS
        ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        world.save(Path(folder))
        with open_trace(folder) as trace:
            got = trace.query("token_experts", **asked).rows()
    assert {row.pop("run") for row in got} <= {Path(folder).name}
    assert got == expected


def test_tokens_have_the_same_numbers_in_every_layer(tmp_path: Path) -> None:
    """Layer 1 lacks some tokens; those it has are numbered as in layer 0."""
    write_meta(tmp_path, meta(layers=[layer_info(0, 4), layer_info(1, 4)]))
    where = {"step": 0, "forward": 0, "window": 0}
    segment(tmp_path, "tokens", [
        {**where, "token": t, "sequence": 0, "position": t} for t in range(6)])  # fmt: skip
    segment(tmp_path, "routing", [
        {**where, "layer": layer, "token": t, "expert_ids": [t % 4], "weights": [1.0]}
        for layer in (0, 1) for t in range(6) if layer == 0 or t % 2])  # fmt: skip
    with open_trace(tmp_path) as trace:
        rows = trace.query("token_experts", layer=1).rows()
    assert [(r["nth"], r["position"], r["expert"]) for r in rows] == [
        (1, 1, 1),
        (3, 3, 3),
        (5, 5, 1),
    ]


def test_a_trace_without_rows_has_no_answer_and_no_error(tmp_path: Path) -> None:
    with open_trace(write_run(tmp_path, token_rows=False).path) as trace:
        assert trace.query("token_experts").rows() == []
        with pytest.raises(QueryError, match="by must be sequence or forward, got 'tag'"):
            trace.query("token_experts", by="tag")
