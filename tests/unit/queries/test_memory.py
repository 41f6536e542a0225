"""`memory`: layers and phases apart, from a trace; and what it refuses."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.expert_tokens import simulated
from support.sequences import Choice, write_sequences
from support.traces import layer_info, meta, segment, write_run

from moe_lens.errors import QueryError
from moe_lens.queries.memory import memory
from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta


def sets(choices: list[Choice], layer: int) -> list[list[set[int]]]:
    """By sequence and token: the experts that computed something."""
    out: dict[int, list[set[int]]] = defaultdict(list)
    for c in choices:
        if c.layer == layer:
            ran = {e for slot, e in enumerate(c.experts) if slot not in c.dropped}
            if ran:  # a token that nothing computed asks for nothing
                out[c.sequence].append(ran)
    return list(out.values())


def lru(strings: list[set[int]], first: int, size: int) -> float:
    def last(t: int, e: int) -> int:
        return max((i for i in range(t + 1) if e in strings[i]), default=-1)

    return simulated(strings, size, first, last) / sum(map(len, strings[first:]))


def test_layers_are_measured_from_what_their_experts_computed(tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run", sequences=6)
    with open_trace(tmp_path / "run") as trace:
        found = list(memory(trace, batch=2))
    assert [(x.phase, x.info.layer) for x in found] == [("train", 0), ("train", 1), ("train", 2)]
    for each in found:
        by_sequence = sets(choices, each.info.layer)
        flat = [needed for of in by_sequence for needed in of]
        measured = each.memory
        assert (measured.tokens, measured.sequences) == (len(flat), 6)
        assert measured.fitted in {sum(map(len, by_sequence[:i])) for i in range(1, 6)}
        assert measured.fitted + measured.counted == len(flat)
        for size in range(2, 9):
            assert measured.rate("lru", size) == pytest.approx(lru(flat, measured.fitted, size))
        touched = [len(set().union(*of)) for of in by_sequence]
        assert measured.conversations["touched"].tolist() == touched
        assert measured.recall["last_layer"].isna().all() == (each.info.layer == 0)
        assert measured.groups["tag"].tolist() == ["all tags", "code", "prose"]


def test_forwards_ask_for_the_union_of_their_tokens(tmp_path: Path) -> None:
    choices = write_sequences(tmp_path / "run", sequences=6, length=2, layers=1, experts=12)
    unions = [set().union(*of) for of in sets(choices, 0)]  # a sequence is a forward of its own
    with open_trace(tmp_path / "run") as trace:
        (found,) = memory(trace, unit="forward", batch=2)
    assert found.memory.unit == "forward"
    assert found.memory.largest == max(map(len, unions))
    assert found.memory.fitted + found.memory.counted == 6
    for size in range(found.memory.largest, 13):
        expected = lru(unions, found.memory.fitted, size)
        assert found.memory.rate("lru", size) == pytest.approx(expected)
    assert found.memory.sequences == 6


def test_forwards_of_a_batch(tmp_path: Path) -> None:
    """Two sequences decode together: forward f has position f of both."""
    write_meta(tmp_path, meta(layers=[layer_info(0, 9)]))
    wanted = [({f % 5, 5}, {f % 5, 6 + f % 3}) for f in range(10)]
    where = [{"step": f, "forward": 0, "phase": "decode"} for f in range(10)]
    segment(tmp_path, "steps", [{**w, "tokens": 2} for w in where])
    segment(tmp_path, "tokens", [
        {**w, "token": s, "sequence": s, "position": f}
        for f, w in enumerate(where) for s in (0, 1)])  # fmt: skip
    segment(tmp_path, "routing", [
        {**w, "layer": 0, "token": s, "expert_ids": sorted(wanted[f][s]), "weights": [0.5, 0.5]}
        for f, w in enumerate(where) for s in (0, 1)])  # fmt: skip
    with open_trace(tmp_path) as trace:
        (found,) = memory(trace, unit="forward")
        (single,) = memory(trace)
    unions = [a | b for a, b in wanted]
    assert (found.memory.fitted, found.memory.counted, found.memory.largest) == (5, 5, 3)
    for size in range(3, 10):
        assert found.memory.rate("lru", size) == pytest.approx(lru(unions, 5, size))
    assert found.memory.growth.equals(single.memory.growth)
    assert single.memory.conversations["tokens"].tolist() == [10, 10]


def test_what_comes_before_a_layer_is_the_layer_before(tmp_path: Path) -> None:
    write_sequences(tmp_path / "run")
    with open_trace(tmp_path / "run") as trace:
        everything = {x.info.layer: x.memory.recall for x in memory(trace, batch=2)}
        some = {x.info.layer: x.memory.recall for x in memory(trace, layers=[0, 2], batch=2)}
    assert sorted(some) == [0, 2]
    assert some[2].equals(everything[2])


def test_phases_are_apart_and_one_can_be_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    with open_trace(run) as trace:
        both = [(x.phase, x.info.layer) for x in memory(trace)]
        (one,) = memory(trace, phase="eval", layers=[1])
        (few,) = memory(trace, phase="eval", layers=[1], most=1)
    assert both == [("train", 0), ("train", 1), ("eval", 0), ("eval", 1)]
    assert (one.phase, one.info.layer) == ("eval", 1)
    assert few.memory.tokens == one.memory.tokens  # sequences are whole, and this one is alone


def raises(run: Path, match: str, **asked: Any) -> None:
    with open_trace(run) as trace, pytest.raises(QueryError, match=match):
        list(memory(trace, **asked))


def test_what_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    raises(run, r"no layer 7\. MoE layers of this trace: 0, 1", layers=[0, 7])
    raises(run, r"phase 'decode' \(phases: train, eval\).*tokens=1.0", phase="decode")
    write_run(tmp_path / "other")
    with (
        open_trace([run, tmp_path / "other"]) as two,
        pytest.raises(QueryError, match="run, other"),
    ):
        list(memory(two))
    counts = write_run(tmp_path / "counts", token_rows=False).path
    raises(counts, r"no per-token rows, only counts.*tokens=1\.0.*--tokens 1")
    write_sequences(tmp_path / "one", sequences=1)
    raises(tmp_path / "one", "Fewer than two forwards", unit="forward")


def test_experts_that_choose_tokens_are_left_out_and_refused_alone(tmp_path: Path) -> None:
    infos = [
        layer_info(0, 4, router="hash"),
        layer_info(1, 4, None, router="expert-choice"),
        layer_info(2, 4),
    ]
    write_meta(tmp_path, meta(layers=infos))
    where = {"step": 0, "forward": 0}
    segment(tmp_path, "steps", [{**where, "phase": "eval", "tokens": 4}])
    segment(tmp_path, "tokens", [
        {**where, "token": t, "sequence": 0, "position": t} for t in range(4)])  # fmt: skip
    segment(tmp_path, "routing", [
        {**where, "layer": layer, "token": t, "expert_ids": [t % 3], "weights": [1.0]}
        for layer in range(3) for t in range(4)])  # fmt: skip
    with open_trace(tmp_path) as trace:
        found = list(memory(trace))
    assert [x.info.layer for x in found] == [0, 2]
    # Layer 2 follows one whose experts choose: nothing foretells it.
    assert found[1].memory.recall["last_layer"].isna().all()
    raises(tmp_path, "experts choose tokens: every expert computes", layers=[1])
