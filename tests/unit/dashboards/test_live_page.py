"""The Live page: of a run that is being recorded, of one that ended, and of one that is gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.apptest import texts, tile, turned
from support.traces import START_NS, segment, write_run

from moe_lens.trace.meta import Attempt

pytestmark = pytest.mark.slow


def test_a_run_that_is_being_recorded(opened: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, open_tables=("load", "steps"), attempts=[Attempt(0, START_NS)])
    app = turned(opened(run), "live")
    assert not app.exception
    assert tile(app, "Step") == "3"
    assert tile(app, "Capture lag").endswith(" s")
    assert "open, last written" in texts(app)
    late = {"step": 9, "phase": "train", "t_start_ns": START_NS + 10**9, "host_ns": 10**9}
    segment(run, "steps", [{**late, "tokens": 500, "lost_rows": 7, "breaches": 2}], seq=8)
    app.run()
    assert tile(app, "Step") == "9"
    assert tile(app, "Lost rows") == "7"
    assert tile(app, "Breaches") == "2"
    # 4 x 32 tokens and these 500, from the first start to the last end.
    assert tile(app, "Tokens per second") == "314"


def test_a_run_that_has_ended(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    app = turned(opened(tmp_path / "run"), "live")
    assert not app.exception
    assert "This recording has ended: closed." in texts(app)
    assert tile(app, "Capture lag") == "–"


def test_a_run_that_is_deleted_meanwhile(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    app = turned(opened(tmp_path / "run"), "live")
    shutil.rmtree(tmp_path / "run")
    app.run()
    assert not app.exception
    assert "does not exist" in texts(app)
