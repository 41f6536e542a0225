"""A disk that refuses: one clear error, the model goes on or stops, nothing written is lost.

The full disk is a limit on the size of a file (RLIMIT_FSIZE, with its signal ignored): a write past
it fails with EFBIG, as a write to a full disk does with ENOSPC. It holds for a whole process, so
each case runs in one of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.models import LAYERS, VOCAB, build

import moe_lens
from moe_lens.errors import TraceWriteError
from moe_lens_hooks.recorder import Recorder

LIMIT = 400_000
"""Bytes: less than what fifty steps of per-token rows take in their stream."""

REASON = "File too large"


def run_on_a_full_disk(run: Path, on_write_error: str) -> None:
    """In a process of its own: record until the disk is full, and beyond; print what happened."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    model = build("mixtral")
    ids = torch.arange(4 * 32).reshape(4, 32) % VOCAB
    with torch.no_grad():
        expected = model(ids).logits
    out = {"same": True, "steps": 0, "flushed": 0, "raised": [], "closed": None, "hooks": None}
    recorder = Recorder(model, run, tokens=1.0, on_write_error=on_write_error)
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        for step in range(60):
            try:
                with recorder.step():
                    out["same"] &= bool((model(ids).logits == expected).all())
                out["steps"] += 1
                if step < 3:
                    recorder.flush()
                    out["flushed"] += 1
                if step == 3:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
                elif step > 3:
                    recorder.flush()  # the writer has a thread of its own: wait for what it says
            except TraceWriteError as e:
                out["raised"].append(str(e))
                break
        out["warned"] = [str(w.message) for w in warned]
        try:
            recorder.close()
        except TraceWriteError as e:
            out["closed"] = str(e)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    out["hooks"] = len(hooks)
    print(json.dumps(out))


@pytest.fixture
def full_disk(tmp_path):
    """Returns a function of `on_write_error`: the folder of the trace, and what happened."""

    def record(on_write_error: str):
        run = tmp_path / "run"
        path = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, __file__, str(run), on_write_error],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no traceback of a thread, no second complaint
        return run, json.loads(done.stdout)

    return record


def assert_readable(run: Path, flushed: int) -> None:
    """All that was flushed is there, and what else is there is whole."""
    with moe_lens.open(run) as trace:
        steps = trace.sql("select count(distinct step) as n from steps").rows()[0]["n"]
        assert steps >= flushed > 0
        rows = trace.sql(
            "select step, count(*) as n from routing group by step order by step limit $n",
            n=flushed,
        ).rows()
        assert [r["n"] for r in rows] == [4 * 32 * LAYERS] * flushed
        routed = trace.sql("select sum(routed) as n from load where step < $n", n=flushed).rows()[
            0
        ]["n"]
        assert routed == flushed * 4 * 32 * LAYERS * 2


def assert_clear(message: str, run: Path) -> None:
    assert str(run) in message
    assert REASON in message
    assert "what was written before stays readable" in message
    assert "\n" not in message


@pytest.mark.slow
def test_a_full_disk_stops_the_step_with_one_clear_error(full_disk):
    run, out = full_disk("raise")
    assert len(out["raised"]) == 1
    assert_clear(out["raised"][0], run)
    assert out["warned"] == []
    assert out["hooks"] == 0
    assert out["same"]
    assert_readable(run, out["flushed"])


@pytest.mark.slow
def test_a_full_disk_lets_the_model_run_on_if_asked_to(full_disk):
    run, out = full_disk("warn")
    assert out["raised"] == []
    assert out["steps"] == 60
    assert out["same"]
    assert len(out["warned"]) == 1
    assert_clear(out["warned"][0], run)
    assert out["closed"] is None
    assert out["hooks"] == 0
    assert_readable(run, out["flushed"])


def test_a_path_below_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    run = tmp_path / "file" / "run"
    model = build("mixtral")
    with pytest.raises(TraceWriteError, match="Not a directory") as raised:
        Recorder(model, run)
    assert str(run) in str(raised.value)
    # The model is as it was: free for the next recorder, and with no hook on it.
    with Recorder(model, tmp_path / "other") as recorder, recorder.step(), torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))


if __name__ == "__main__":
    run_on_a_full_disk(Path(sys.argv[1]), sys.argv[2])
