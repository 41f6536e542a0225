"""Ranks that are processes: they compute what a simulation says, and end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support.traces import write_run

from moe_lens.replay.ep.session import replay_ep
from moe_lens.replay.ep.settings import Parallel
from moe_lens.replay.settings import Settings

SIZES = ("--hidden", "16", "--intermediate", "16", "--dtype", "float32", "--device", "cpu")
COUNTS = (
    "tokens", "rows", "arrived", "touched", "sent_rows", "sent_bytes", "received_rows",
    "received_bytes",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tokens=30, steps=2).path


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_lens", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return process.returncode, out, err


def test_processes_have_the_loads_that_a_simulation_says(run: Path) -> None:
    group = ("--ep", 2, "--placement", "eplb", "--replicas", 2)
    code, out, err = ended(
        start("replay", run, *SIZES, "--repeats", 2, *group, "--nproc", 2, "--json")
    )
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["about"]["mode"] == "real"
    assert said["about"]["exchange"] == "measured"
    assert said["about"]["world"] == {"backend": "gloo", "device": "cpu", "machines": 1}
    assert all("the slowest rank computes" in answer for answer in said["answers"])
    real = pq.read_table(said["result"]).to_pylist()
    settings = Settings(hidden=16, intermediate=16, dtype="float32", device="cpu", repeats=2)
    simulated = replay_ep(run, Parallel(2, "eplb", 2), settings)

    def loads(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], tuple[int, ...]]:
        keys = ("placement", "layer", "step", "forward", "ep_rank")
        return {tuple(r[k] for k in keys): tuple(r[c] for c in COUNTS) for r in rows}

    assert len(real) == 2 * 2 * 2 * 2
    assert loads(real) == loads(simulated.rows)
    for row in real:
        assert row["mode"] == "real"
        assert row["busy_ns"] > 0
        assert row["dispatch_ns"] > 0
        assert row["combine_ns"] > 0
    waits = [(r["layer"], r["step"], r["placement"], r["wait_ns"] == 0) for r in real]
    assert sum(w[-1] for w in waits) == len(waits) / 2  # of two ranks one is the slowest


def test_a_killed_rank_ends_the_others(run: Path) -> None:
    words = ("--repeats", 100_000, "--forwards", "all", "--ep", 2, "--nproc", 2)
    launcher = start("replay", run, *SIZES, *words)
    try:
        victim = computing(launcher)
        victim.kill()
        killed = time.monotonic()
        code, out, err = ended(launcher)
    finally:
        launcher.kill()
    assert time.monotonic() - killed < 50  # no rank waited for the timeout
    assert (code, out) == (1, "")
    *others, last = err.splitlines()
    assert last == "error: rank 1 was killed (signal 9), and the others were ended."
    assert len(others) <= 1, err
    assert all(line.startswith("error: another rank ended, or") for line in others), err


def computing(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process that is rank 1, once it has joined the other."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                # It takes part once it has connected to the store and to its peer.
                rank = child.environ().get("RANK")
                linked = [c for c in child.net_connections("tcp") if c.status == "ESTABLISHED"]
            except psutil.Error:
                continue
            if rank == "1" and len(linked) >= 2:
                return child
        time.sleep(0.2)
    raise AssertionError(f"no rank came up: {launcher.communicate()}")


def test_a_rank_that_lacks_the_trace_ends_all(run: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        start("replay", place, *SIZES, "--ep", 2, RANK=str(rank), LOCAL_WORLD_SIZE="2", **common)
        for rank, place in enumerate((run, tmp_path / "nowhere"))
    ]
    (code, out, err), (other_code, other_out, other_err) = map(ended, both)
    assert (code, out, err) == (1, "", "")  # the other has said it
    assert (other_code, other_out) == (1, "")
    (line,) = other_err.splitlines()
    assert line.startswith("error: rank 1: ")
    assert "does not exist" in line


def test_as_many_processes_as_ranks(run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code, out, err = ended(start("replay", run, *SIZES, "--ep", 2, **alone))
    assert (code, out) == (1, "")
    assert err == ("error: --ep 2 takes 2 processes, and 1 were started: each is a rank.\n")
