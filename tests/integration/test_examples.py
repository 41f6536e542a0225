"""Every example runs, as its docstring says to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(script, tmp_path):
    env = os.environ | {"PYTHONWARNINGS": "error:::moe_lens"}
    done = subprocess.run(
        [sys.executable, str(script), "run"], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "run" / "meta" / "rank=0.json").exists()
