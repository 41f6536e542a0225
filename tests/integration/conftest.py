"""A trace of the demo, made once by its own command with few steps."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory):
    """(folder of the trace, what the command printed)."""
    out = tmp_path_factory.mktemp("demo") / "run"
    argv = [sys.executable, "-m", "moe_lens", "demo", "--steps", "6", "--out", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def demo_trace(demo_output):
    return demo_output[0]
