"""`paths` and what the catalogue knows of a configuration, against loops over a trace's rows."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.traces import write_run

from moe_lens.metrics.catalogue import METRICS, Measured, measure, metrics
from moe_lens.queries.evidence import evidence
from moe_lens.queries.paths import paths
from moe_lens.queries.session import one_run, open_trace
from moe_lens.trace.layout import meta_path
from moe_lens.trace.meta import read_meta, write_meta
from moe_lens.trace.synthetic import Spec, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More layers than are read at a time."""
    path = tmp_path_factory.mktemp("traces") / "run"
    generate(path, Spec(layers=18, experts=6, top_k=2, steps=2, phases=("train", "eval"), skew=1.5,
                        popularity="zipf", sequences=4, length=16))  # fmt: skip
    return path


def by_loop(path: Path, phase: str, layers: range) -> list[tuple[int, ...]]:
    with open_trace(path) as trace:
        rows = trace.sql(
            "select r.*, s.phase from routing r join steps s using (run, rank, step, forward)"
        ).rows()
    first: dict[tuple[object, ...], dict[int, int]] = defaultdict(dict)
    for row in rows:
        if row["phase"] == phase:
            weighed = zip(row["weights"], row["expert_ids"], strict=True)  # type: ignore[call-overload]
            token = row["rank"], row["step"], row["forward"], row["token"]
            first[token][row["layer"]] = max(weighed, key=lambda x: x[0])[1]  # type: ignore[index]
    return [tuple(of[layer] for layer in layers) for of in first.values()]


@pytest.mark.parametrize("layers", [range(18), range(3), range(15, 18)], ids=str)
def test_paths_are_the_first_choices_of_the_rows(run: Path, layers: range) -> None:
    wanted = Counter(by_loop(run, "train", layers))
    with open_trace(run) as trace:
        found = paths(trace, "train", None if len(layers) == 18 else layers)
    assert list(found) == ["main"]
    made = found["main"]
    assert (made.layers, made.tokens) == (len(layers), wanted.total())
    assert made.values["distinct"] == len(wanted)
    top = sum(n for _, n in wanted.most_common(10)) / wanted.total()
    assert made.values["top_10"] == pytest.approx(top)


def test_what_has_no_paths(tmp_path: Path, run: Path) -> None:
    write_run(tmp_path / "counts", token_rows=False)
    with open_trace(tmp_path / "counts") as trace:
        assert paths(trace) == {}
    with open_trace(run) as trace:
        assert paths(trace, "train", [3]) == {}
        assert paths(trace, "prefill") == {}


def test_streams_apart_and_no_layer_whose_experts_choose(tmp_path: Path) -> None:
    write_run(tmp_path / "run", layers=4)
    meta = read_meta(meta_path(tmp_path / "run", 0))
    meta.layers[1].router = "expert-choice"
    write_meta(tmp_path / "run", meta)
    with open_trace(tmp_path / "run") as trace:
        assert paths(trace)["main"].layers == 3
    for info in meta.layers[2:]:
        info.stream = "encoder"  # there are no tokens of it
    write_meta(tmp_path / "run", meta)
    with open_trace(tmp_path / "run") as trace:
        assert paths(trace) == {}


def measured(path: Path, **changes: object) -> dict[str, Measured]:
    """Of layer 0, with another configuration than the one that was written."""
    asked = [m for m in metrics().values() if m.group in ("configurations", "transitions")]
    with open_trace(path) as trace:
        info = one_run(trace)
        layer = dataclasses.replace(info.layers[0], **changes)  # type: ignore[arg-type]
        known = evidence(trace, info, layer, "train", asked)
        return {m.name: measure(m, known) for m in asked}


def test_the_configuration_is_the_recorded_one(run: Path) -> None:
    found = measured(run, hidden_size=512, intermediate_size=256)
    assert found["granularity"].value == 8
    assert found["reachable_bits"].value == pytest.approx(np.log2(15))
    limited = measured(run, groups=3, top_groups=1)
    assert limited["reachable_bits"].value == pytest.approx(np.log2(3))
    assert measured(run, groups=3)["reachable_bits"].value == pytest.approx(np.log2(15))
    assert "no widths" in measured(run, hidden_size=None)["granularity"].lacks


def test_what_cannot_be_said_has_its_reason(run: Path, tmp_path: Path) -> None:
    zero = measured(run, zero_experts=2)
    assert "zero-compute" in zero["reachable_bits"].lacks
    odd = measured(run, groups=4, top_groups=2)
    assert odd["reachable_bits"].lacks == "4 groups of 6 experts, of which a token uses 2"
    assert odd["distinct_sets"].lacks == ""
    assert odd["distinct_sets"].chance is None
    chosen = measured(run, router="expert-choice", top_k=None)
    for name in ("distinct_sets", "set_entropy", "independence_deficit", "sparsity"):
        assert "experts choose" in chosen[name].lacks, name
    write_run(tmp_path / "counts", token_rows=False)
    counts = measured(tmp_path / "counts")
    assert counts["set_entropy"].lacks.startswith("no per-token rows: record with tokens=1.0")
    assert counts["sparsity"].value == pytest.approx(2 / 8)
    few = tmp_path / "few"
    generate(few, Spec(layers=1, experts=64, top_k=8, steps=1, sequences=2, length=32))
    found = measured(few)
    assert found["set_entropy"].lacks.startswith("most tokens chose a set of experts that no other")
    assert found["effective_sets"].lacks == "no two tokens chose the same set of experts"


def test_a_next_layer_is_read_with_the_one_before(run: Path) -> None:
    asked = [METRICS["affinity"]]
    with open_trace(run) as trace:
        info = one_run(trace)
        known = evidence(trace, info, info.layers[1], "eval", asked)
    pairs = by_loop(run, "eval", range(2))
    most = sum(
        max(Counter(j for i, j in pairs if i == expert).values())
        for expert in {i for i, _ in pairs}
    )
    assert measure(asked[0], known).value == pytest.approx(most / len(pairs))
