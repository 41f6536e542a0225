"""The Capacity page without a browser: rates, policies, and what was not recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.apptest import texts, tile, turned
from support.traces import layer_info, meta, segment, write_run

from moe_lens.numbers import percent
from moe_lens.trace.meta import write_meta

pytestmark = pytest.mark.slow


def test_rates_are_those_of_a_loop(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", steps=4, tokens=200)
    app = turned(opened(tmp_path / "run", phase="train"), "capacity")
    assert not app.exception
    load = [r for r in written.rows["load"] if r["phase"] == "train"]
    routers = [r for r in written.rows["routers"] if r["phase"] == "train"]
    routed = sum(r["routed"] for r in load)
    assert tile(app, "Choices") == f"{routed:,}"
    assert tile(app, "Overflow rate") == percent(sum(r["overflowed"] for r in load) / routed)
    assert tile(app, "Dropped-token rate") == percent(sum(r["dropped"] for r in load) / routed)
    unserved = sum(r["unserved_tokens"] for r in routers)
    assert tile(app, "Unserved") == percent(unserved / sum(r["tokens"] for r in routers))
    # 2 x 200 / 8 + 2 slots of 8 experts, over 2 x 200 choices
    assert tile(app, "Capacity factor") == f"{52 * 8 / 400:.2f}"
    assert "2 layers: drop by position" in texts(app)


def test_a_dropless_run_says_so_and_has_the_what_if(opened: Any, tmp_path: Path) -> None:
    layers = [layer_info(i) for i in range(2)]
    written = write_run(tmp_path / "run", phases=("eval",))
    write_meta(tmp_path / "run", meta(layers=layers))
    assert sum(r["dropped"] for r in written.rows["load"]) == 0
    app = turned(opened(tmp_path / "run"), "capacity")
    assert not app.exception
    said = texts(app)
    assert "2 layers: dropless" in said
    assert "No choice found its expert full" in said
    assert tile(app, "Capacity factor") == "not known"
    assert "A capacity factor of" in said
    assert "none is marked" in said


def test_forwards_of_different_sizes_say_the_range(opened: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_meta(run, meta(layers=[layer_info(0, capacity_policy="drop-by-position")]))
    for step, tokens in enumerate((100, 50)):
        at = {"step": step, "window": step, "phase": "train"}
        row = {**at, "tokens": tokens, "forwards": 1, "capacity": 25, "routed": 2 * tokens}
        for table in ("load", "layers", "routers", "slices", "steps"):
            segment(run, table, [row], seq=step)
    app = turned(opened(run), "capacity")
    assert not app.exception
    assert tile(app, "Capacity factor") == f"{2 * 25 * 8 / 300:.2f}"
    assert "between 1.00 and 2.00" in texts(app)


def test_without_rows_of_tokens_the_positions_are_missing(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", token_rows=False, tokens=100)
    app = turned(opened(tmp_path / "run"), "capacity")
    assert not app.exception
    assert "No rows of single tokens were kept." in texts(app)


@pytest.mark.parametrize(
    "shape",
    [
        {"experts": 384},
        {"tags": ("<script>alert(1)</script>", 'it\'s "q" ![x](http://y) $a$')},
        {"zero_experts": 2},
        {"steps": 0},
        {"layers": 1},
    ],
    ids=lambda shape: next(iter(shape)),
)
def test_odd_runs(opened: Any, tmp_path: Path, shape: dict[str, Any]) -> None:
    write_run(tmp_path / "run", **shape)
    app = turned(opened(tmp_path / "run"), "capacity")
    assert not app.exception
    assert not app.error
