"""The stored question `recent` against a loop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.traces import START_NS, meta, segment

from moe_lens.queries.session import open_trace
from moe_lens.trace.meta import write_meta

MINUTE = 60 * 10**9

forwards = st.lists(
    st.tuples(st.integers(0, 10), st.integers(1, 90 * 10**9), st.sampled_from(["train", "eval"])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(rows=forwards, minutes=st.sampled_from([0.0, 0.5, 2.0, 100.0]))
@pytest.mark.parametrize("phase", [None, "eval"])
def test_recent(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, str]],
    minutes: float,
    phase: str | None,
) -> None:
    run = tmp_path_factory.mktemp("recent") / "run"
    write_meta(run, meta())
    table, start = [], START_NS
    for step, (half_minutes, host_ns, of_phase) in enumerate(rows):
        start += half_minutes * MINUTE // 2
        table.append(
            {"step": step, "phase": of_phase, "t_start_ns": start, "host_ns": host_ns,
             "tokens": step + 1, "lost_rows": step, "breaches": 1}
        )  # fmt: skip
    segment(run, "steps", table)
    chosen = [r for r in table if phase is None or r["phase"] == phase]
    with open_trace(run) as trace:
        answer = trace.query("recent", minutes=minutes, phase=phase).rows()
    if not chosen:
        assert answer == []
        return
    newest = max(r["t_start_ns"] for r in chosen)
    late = [r for r in chosen if newest - r["t_start_ns"] <= minutes * MINUTE]
    seconds = max(r["t_start_ns"] + r["host_ns"] for r in late) - min(r["t_start_ns"] for r in late)
    tokens = sum(r["tokens"] for r in late)
    assert answer == [
        {
            "run": "run",
            "first_step": min(r["step"] for r in late),
            "last_step": max(r["step"] for r in late),
            "forwards": len(late),
            "tokens": tokens,
            "seconds": pytest.approx(seconds / 1e9),
            "tokens_per_second": pytest.approx(tokens * 1e9 / seconds),
            "lost_rows": sum(r["lost_rows"] for r in late),
            "breaches": len(late),
        }
    ]
