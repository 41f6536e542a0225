"""The Replay page: there where a run has results, and a table of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.apptest import texts, turned
from support.replayed import timings, write
from support.traces import write_run

from moe_lens.errors import TraceError
from moe_lens.queries.replayed import replayed, results
from moe_lens_dashboards.components.filters import Filters
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.pages import VIEWS

NAME = "it's [*] <b>1"


def result(run: Path, name: str, rows: int) -> None:
    (run / "replay").mkdir(parents=True, exist_ok=True)
    table = pa.table({"layer": range(rows), "ms": [n / 4 for n in range(rows)]})
    pq.write_table(table, run / "replay" / f"{name}.parquet", row_group_size=4)


def test_results_by_name_and_their_first_rows(tmp_path: Path) -> None:
    assert results(tmp_path) == []
    result(tmp_path, NAME, 10)
    result(tmp_path, "empty", 0)
    (tmp_path / "replay" / "notes.txt").write_text("")
    assert results(tmp_path) == ["empty", NAME]
    rows = replayed(tmp_path, NAME, 6).rows()
    assert rows == [{"layer": n, "ms": n / 4} for n in range(6)]
    assert len(replayed(tmp_path, NAME, 100)) == 10
    assert replayed(tmp_path, "empty", 6).columns == ["layer", "ms"]


def test_what_is_no_result(tmp_path: Path) -> None:
    result(tmp_path / "run", "good", 1)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(TraceError, match="no replay result"):
        replayed(tmp_path / "run", "../../other", 5)
    (tmp_path / "run" / "replay" / "bad.parquet").write_bytes(b"PAR1 no more PAR1")
    with pytest.raises(TraceError, match="cannot be read"):
        replayed(tmp_path / "run", "bad", 5)


def test_the_navigation_shows_it_where_there_is_something(tmp_path: Path) -> None:
    view = next(v for v in VIEWS if v.name == "replay")
    run = OpenRun(str(tmp_path), "run", Filters())
    assert not view.shown(None)
    assert not view.shown(run)
    result(tmp_path, "a", 1)
    assert view.shown(run)
    assert all(v.shown(None) for v in VIEWS if v is not view)


@pytest.mark.slow
def test_the_page(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    app = turned(opened(tmp_path / "run"), "replay")
    assert not app.exception
    assert "This run has no results of a replay." in texts(app)
    result(tmp_path / "run", NAME, 3)
    (tmp_path / "run" / "replay" / "bad.parquet").write_bytes(b"")
    app.run()
    assert not app.exception
    assert "cannot be read" in texts(app)
    assert app.dataframe[0].value["ms"].tolist() == [0.0, 0.25, 0.5]
    assert any(r"\<b\>" in s.value for s in app.subheader)


@pytest.mark.slow
def test_a_result_of_ours_is_drawn_by_phase(opened: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    said = {
        "state": "interrupted",
        "policy": {"name": "drop", "capacity_factor": 1.25, "by": "prob"},
        "shapes": [{"hidden": 64, "intermediate": 32, "dtype": "bfloat16"}],
        "backends": {"cpu": "why"},
        "device_name": "<b>chip",
        "clock": "process CPU time",
    }
    write(run, "mine", timings(4), said)
    app = turned(opened(run), "replay")
    assert not app.exception
    shown = texts(app)
    assert "This replay was interrupted" in shown
    assert "Policy drop; capacity factor 1.25 by prob; 64 × 32 bfloat16" in shown
    assert any(r"\<b\>chip" in c.value for c in app.caption)
    assert [list(f.value["layer"]) for f in app.dataframe] == [[0, 3], [0, 3]]
    for frame in app.dataframe:  # three or four forwards: the slowest, and no p90 or p99
        assert frame.value["p99_ms"].isna().all()
        assert frame.value["p90_ms"].isna().all()
        assert (frame.value["max_ms"] >= frame.value["p50_ms"]).all()
    assert len(app.get("plotly_chart")) == 2
    app = turned(opened(run, first_layer="1"), "replay")
    assert [list(f.value["layer"]) for f in app.dataframe] == [[3], [3]]
