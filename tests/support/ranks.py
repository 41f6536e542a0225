"""Processes that are ranks of one job on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str, world: int, folder: Path) -> None:
    """Run `tests/support/SCRIPT WORLD FOLDER RANK` for each rank; all must succeed."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(world), str(folder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [*command, str(r)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for r in range(world)
    ]
    said = [rank.communicate(timeout=240)[0].decode() for rank in ranks]
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 0, text
