"""The capacity factor that was in force, against a loop; and its mark on the what-if curve."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.traces import layer_info, meta, segment, write_run

from moe_lens.figures.capacity_curve import capacity_curve
from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta


@pytest.mark.parametrize(
    "narrow", [{}, {"first_step": 2}, {"phase": "eval"}, {"rank": 1}, {"last_layer": 0}]
)
def test_the_factor_is_that_of_a_loop(tmp_path: Path, narrow: dict[str, Any]) -> None:
    written = write_run(tmp_path / "run", steps=4, ranks=(0, 1), world=2)
    found: dict[int, list[float]] = defaultdict(list)
    for row in written.rows["layers"]:
        kept = (
            row["capacity"] is not None
            and row["step"] >= narrow.get("first_step", 0)
            and row["phase"] == narrow.get("phase", row["phase"])
            and row["rank"] == narrow.get("rank", row["rank"])
            and row["layer"] <= narrow.get("last_layer", 1)
        )
        if kept:
            found[row["layer"]].append(row["capacity"] * 8 / (2 * row["tokens"]))
    with open_trace(tmp_path / "run") as trace:
        answer = trace.query("recorded_capacity", **narrow).rows()
    assert [(r["layer"], r["forwards"]) for r in answer] == [
        (layer, len(each)) for layer, each in sorted(found.items())
    ]
    for row in answer:
        of = found[row["layer"]]
        assert row["capacity_factor"] == pytest.approx(sum(of) / len(of))
        assert (row["lowest"], row["highest"]) == pytest.approx((min(of), max(of)))


def test_only_capacities_of_a_whole_forward_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    layers = [
        layer_info(0),
        layer_info(1, adapter="switch"),
        layer_info(2, top_k=None),
        layer_info(3),
        layer_info(4),
    ]
    write_meta(run, meta(layers=layers))
    row = {"tokens": 10, "forwards": 1, "capacity": 5}
    rows = [{**row, "layer": i} for i in range(3)]
    rows += [{**row, "layer": 3, "forwards": 2}, {**row, "layer": 4, "capacity": None}]
    segment(run, "layers", rows)
    with open_trace(run) as trace:
        answer = trace.query("recorded_capacity").rows()
    assert [(r["layer"], r["capacity_factor"]) for r in answer] == [(0, 2.0)]


def test_the_curve_marks_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with open_trace(tmp_path / "run") as trace:
        table = trace.query("capacity_sweep").df()
    marked = capacity_curve(table, 1.25)
    assert [s.x0 for s in marked.layout.shapes] == [1.25]
    assert [a.text for a in marked.layout.annotations] == ["recorded: 1.25"]
    assert not capacity_curve(table).layout.shapes
