"""A trace of the demo, made once by its own command with few steps, for all workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory):
    """(folder of the trace, what the command printed); shared by all workers: to be read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    out, said = root / "demo" / "run", root / "demo" / "stdout.txt"
    with FileLock(root / "demo.lock"):
        if not said.exists():
            argv = [sys.executable, "-m", "moe_lens", "demo", "--steps", "6", "--out", str(out)]
            done = subprocess.run(argv, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said.write_text(done.stdout, "utf-8")
    return out, said.read_text("utf-8")


@pytest.fixture(scope="session")
def demo_trace(demo_output, tmp_path_factory):
    """The trace, in a copy of this worker's own."""
    return shutil.copytree(demo_output[0], tmp_path_factory.mktemp("demo") / "run")
