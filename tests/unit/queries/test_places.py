"""Which runs there are below a folder, and whether one changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.traces import segment, write_run

from moe_lens.errors import TraceError
from moe_lens.queries.described import describe
from moe_lens.queries.places import find_runs, version
from moe_lens.queries.session import open_trace
from moe_lens.trace.schema import TABLES


def test_runs_of_a_folder_come_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "deep/er/c", "a it's")):
        write_run(tmp_path / name, steps=1)
        os.utime(tmp_path / name / "meta/rank=0.json", (1000 - age, 1000 - age))
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    write_run(tmp_path / ".hidden/run", steps=1)
    expected = [tmp_path / "b", tmp_path / "deep/er/c", tmp_path / "a it's"]
    assert find_runs(tmp_path) == expected
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


@pytest.mark.parametrize("what", ["missing", "a file", "empty", "foreign"])
def test_no_run_is_said_in_a_line(tmp_path: Path, what: str) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("x")
    elif what != "missing":
        place.mkdir()
    if what == "foreign":
        (place / "notes.txt").write_text("x")
    with pytest.raises(TraceError) as caught:
        find_runs(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_version_changes_with_every_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, open_tables=("load",))
    seen = [version(run)]
    assert version(run) == seen[0]
    segment(run, "steps", [{"step": 9}], seq=7)
    seen.append(version(run))
    with next(run.glob("_open/rank=0/load-*.arrows")).open("ab") as f:
        f.write(b"x")
    seen.append(version(run))
    (run / "meta/rank=0.json").write_text("{}")
    seen.append(version(run))
    next(run.glob("load/rank=0/*.parquet")).unlink()
    seen.append(version(run))
    shutil.rmtree(run)
    seen.append(version(run))
    assert len(set(seen)) == len(seen)


def test_every_column_of_a_view_has_a_meaning(tmp_path: Path) -> None:
    write_run(tmp_path)
    with open_trace(tmp_path) as trace:
        for name in TABLES:
            columns = trace.table(name).columns
            view = describe(name, dict.fromkeys(columns, "VARCHAR"))
            assert view.row == TABLES[name].row
            assert [c.name for c in view.columns] == columns
            assert all(c.meaning for c in view.columns)
