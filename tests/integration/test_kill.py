"""`kill -9` at random moments: what was flushed is there, and the trace goes on."""

from __future__ import annotations

import pytest
from support.killed import kill_once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "mode"),
    [(1, "writer"), (2, "writer"), (3, "writer"), (4, "writer"), (5, "record"), (6, "record")],
)
def test_nothing_flushed_is_lost(tmp_path, seed, mode):
    outcome = kill_once(tmp_path / "run", seed, mode)
    assert outcome.wrong == []
    assert outcome.found >= outcome.flushed


def test_a_kill_before_the_first_flush_leaves_a_trace_that_goes_on(tmp_path):
    outcome = kill_once(tmp_path / "run", 7, "writer", longest=0.0)
    assert outcome.wrong == []
