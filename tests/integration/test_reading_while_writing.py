"""A run that is being recorded is asked 500 times: nothing fails, and no count goes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lens.errors import TraceError
from moe_lens.queries.session import Trace, open_trace

LOOKS = 100
QUESTIONS = ("load_map", "layer_balance", "recent")
"""With two counts that may only grow, five queries a look."""
WRITER = """
import sys, time
from pathlib import Path

import moe_lens, torch
from support.models import VOCAB, build

model = build("mixtral")
stop = Path(sys.argv[2])
with moe_lens.record(model, sys.argv[1], tokens=0.5) as rec, torch.no_grad():
    step = 0
    while not stop.exists():
        with rec.step(tags=["code", "prose"]):
            model(input_ids=torch.randint(0, VOCAB, (2, 16)))
        step += 1
        time.sleep(0.01)
        if step % 7 == 0:
            rec.flush()
print(step)
"""


@pytest.mark.slow
def test_five_hundred_queries_during_recording(tmp_path: Path) -> None:
    run, stop = tmp_path / "run", tmp_path / "stop"
    tests = Path(__file__).parents[1]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run), str(stop)],
        cwd=tests, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with writer:
        try:
            trace = first_look(run, writer)
            seen = [look(trace) for _ in range(LOOKS)]
        finally:
            stop.touch()
        steps = int(writer.communicate(timeout=60)[0])
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]
    trace.refresh()
    assert routed(trace) == steps * 2 * 16 * 2 * len(trace.info().runs[0].layers)
    trace.close()


def first_look(run: Path, writer: subprocess.Popen[str]) -> Trace:
    """The trace, as soon as it has rows."""
    while True:
        assert writer.poll() is None
        try:
            trace = open_trace(run)
        except TraceError:
            continue  # not begun
        if len(trace.table("load")):
            return trace
        trace.close()


def look(trace: Trace) -> tuple[int, int]:
    """Stored questions about what is there now, and counts that may only grow."""
    trace.refresh()
    for name in QUESTIONS:
        trace.query(name)
    return int(trace.query("run_totals").rows()[0]["tokens"]), routed(trace)  # type: ignore[call-overload]


def routed(trace: Trace) -> int:
    return int(trace.sql("select sum(routed)::bigint as n from load").rows()[0]["n"])  # type: ignore[call-overload]
