"""The Placement page without a browser: its numbers against plain loops, and small runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.apptest import texts, turned

from moe_lens.trace import synthetic

pytestmark = pytest.mark.slow


def test_what_it_shows_is_what_a_loop_counts(opened: Any, tmp_path: Path) -> None:
    truth = synthetic.generate(tmp_path / "run", synthetic.stationary(layers=2, steps=64))
    app = turned(opened(tmp_path / "run"), "placement")
    assert not app.exception
    said = texts(app)
    assert "64 experts of 2 layers on 8 ranks; fitted to 32 forwards, judged by the 32" in said
    assert "helps" in app.success[0].value
    ratios = [
        max(ranks) / (sum(ranks) / 8)
        for forward in truth.counts_FLE[32:].tolist()
        for experts in forward
        for ranks in [[sum(experts[8 * r : 8 * r + 8]) for r in range(8)]]
    ]
    rows = app.dataframe[0].value
    now = rows[rows["placement"] == "contiguous (now)"].iloc[0]
    assert now["max_over_mean"] == pytest.approx(np.mean(ratios))
    assert now["ranks"] is None  # this run has no rows per token
    assert rows[rows["placement"] == "eplb"]["max_over_mean"].iloc[0] < now["max_over_mean"]
    assert "no rows per token" in _annotations(app)


def test_few_forwards_and_a_filter(opened: Any, tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "run", synthetic.Spec(steps=3, sequences=2, length=16))
    app = turned(opened(tmp_path / "run", first_layer="1", last_layer="1"), "placement")
    assert not app.exception
    said = texts(app)
    assert "on 8 ranks; train has too few forwards to keep some apart" in said
    assert "3 forwards are too few" in said


def test_experts_that_do_not_divide(opened: Any, tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "run", synthetic.Spec(experts=1, top_k=1, steps=2))
    app = turned(opened(tmp_path / "run"), "placement")
    assert not app.exception
    assert "do not divide" in texts(app)


def _annotations(app: Any) -> str:
    """Sentences of charts that have nothing to draw."""
    return " ".join(str(chart.proto.spec) for chart in app.get("plotly_chart")).replace("<br>", " ")
