"""The script and the commands of docs/training.md run. (Its callbacks: training_docs_checks.py.)"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SCRIPT = re.search(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)[1]
COMMANDS = re.search(r"^```sh\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)[1].splitlines()


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.py").write_text(SCRIPT)
    said = {}
    programs = {"moe-lens": ["-m", "moe_lens"], "torchrun": ["-m", "torch.distributed.run"]}
    for command in COMMANDS:
        program, *words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, *programs[program], *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        said[next((w.removeprefix("traces/") for w in words if "/" in w), "")] = done.stderr
    assert set(said) == {"", "mine", "module", "two", "mine/MixtralForCausalLM"}
    for name in ("mine", "module", "two"):
        load = tmp_path / "traces" / name / "MixtralForCausalLM" / "load"
        ranks = sorted(p.name for p in load.iterdir())
        assert ranks == (["rank=0", "rank=1"] if name == "two" else ["rank=0"])
    assert "10 steps, 2,560 tokens in traces/mine/MixtralForCausalLM" in said["mine"]
