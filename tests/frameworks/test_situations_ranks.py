"""Two processes under DistributedDataParallel write one trace, each its own tokens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.tables import frame

import moe_lens
from moe_lens.trace.reader import open_run

TESTS = Path(__file__).parents[1]

RANK = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from support.models import TinyModel
import moe_lens

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(TinyModel())
seen = []
for block in model.module.blocks:
    block.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1].tolist()))
torch.manual_seed(1 + rank)
with moe_lens.record(model, {run!r}, tokens=1.0, token_ids=True) as rec:
    for step in range(3):
        ids = torch.randint(0, 32, (2, 4 + rank))
        with rec.step(tags=f"rank{{rank}}"):
            for micro in ids:
                model(micro[None]).square().mean().backward()
print(json.dumps(seen), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_of_data_parallel_training(tmp_path):
    run = tmp_path / "run"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    code = RANK.format(tests=str(TESTS), run=str(run))
    launched = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        launched.append(subprocess.Popen(command, env=env, text=True, **pipes))
    out = [p.communicate(timeout=240) for p in launched]
    assert [p.returncode for p in launched] == [0, 0], out
    seen = [json.loads(stdout) for stdout, _ in out]
    files = open_run(run)
    assert sorted(files.metas) == [0, 1]
    assert files.missing_ranks == []
    assert [m.counts for m in files.metas.values()] == ["own", "own"]
    with moe_lens.open(run) as trace:
        rows = trace.sql("select rank, layer, tag, expert, sum(routed) n from load group by all")
        got = {(r["rank"], r["layer"], r["tag"], r["expert"]): r["n"] for r in rows.rows()}
        steps = trace.sql("select rank, count(*) n, sum(tokens) t from steps group by 1 order by 1")
        assert steps.rows() == [{"rank": 0, "n": 6, "t": 24}, {"rank": 1, "n": 6, "t": 30}]
    naive: dict[tuple[int, int, str, int], int] = {}
    for rank, calls in enumerate(seen):
        for call, ids in enumerate(calls):
            for chosen in ids:
                for expert in chosen:
                    key = (rank, call % 2, f"rank{rank}", expert)
                    naive[key] = naive.get(key, 0) + 1
    assert got == naive
    assert len(frame(run, "sequences")) == 2 * 3 * 2
