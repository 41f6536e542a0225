"""Steps per bucket of a line over time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.traces import layer_info, write_run

from moe_lens.queries.session import open_trace


@pytest.mark.parametrize(
    ("steps", "asked", "every"),
    [
        (240, (None, None), 1),
        (241, (None, None), 2),
        (1_000, (None, None), 5),
        (5_000, (None, None), 64),  # 50 would be round, but sum a million cells step by step
        (10_000, (None, None), 128),
        (10_000, (0, 9_999), 50),
        (10_000, (500, 600), 1),
        (100_000, (None, None), 1_024),
    ],
)
def test_a_line_has_a_readable_number_of_points(
    tmp_path: Path, steps: int, asked: tuple[int | None, int | None], every: int
) -> None:
    with open_trace(write_run(tmp_path / "run").path) as trace:
        small = trace.info().runs[0]
    layers = [layer_info(i, experts=128) for i in range(2)]
    info = replace(small, steps=steps, first_step=0, last_step=steps - 1, layers=layers)
    assert info.every(*asked) == every
