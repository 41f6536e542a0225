"""Rows that go to other processes and come back sum to what one layer with all experts gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from moe_lens.replay.placement.methods import METHODS
from moe_lens.replay.policies import POLICIES

SIZE = 4


def test_many_ranks_give_what_one_gives(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "support.ep_rank", str(tmp_path / "store")]
    # One start of four processes for all cases: what takes long is that each imports torch.
    children = [
        subprocess.Popen(
            [*argv, str(rank), str(SIZE)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        ended = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    for child, (_, err) in zip(children, ended, strict=True):
        assert child.returncode == 0, err
    checks = (len(POLICIES) + 4) * len(METHODS) * 2 * 2
    assert [int(out) for out, _ in ended] == [3 * checks, 2 * checks, checks, checks]
