"""`moe-lens machine` measures, says, and keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe_lens.commands.machine import _print
from moe_lens.replay.machine import highest
from moe_lens.runtime.ceilings import Ceilings


def moe_lens(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_lens", "machine", "--device", "cpu", *words],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"MOE_LENS_CACHE": str(cache)},
    )  # fmt: skip


@pytest.mark.slow
def test_measured_and_kept(tmp_path: Path) -> None:
    done = moe_lens(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    kept = Path(said.pop("stored"))
    assert kept.is_relative_to(tmp_path)
    assert json.loads(kept.read_text()) == said
    assert said["copy_bytes_per_s"] > 0
    assert said["read_bytes_per_s"] > 0
    assert set(said["matmul_flop_per_s"]) == {"bfloat16", "float16", "float32"}
    assert said["threads"] == 1


def test_what_is_higher_stays_and_its_age_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"bfloat16": 200e9, "float32": 100e9}
    then = time.time_ns() - 2 * 3_600 * 10**9
    before = Ceilings(9e9, 8e9, rates, "cpu", "A chip", 2, 1, "", {}, {}, then)
    now = replace(before, copy_bytes_per_s=1e10, matmul_flop_per_s={**rates, "float32": 40e9})
    _print(highest(now, before), now, before)
    assert capsys.readouterr().out.splitlines() == [
        "A chip (cpu, 1 thread)",
        "  copy      10.0 GB/s, read and written",
        "  read      8.0 GB/s",
        "  bfloat16  200.0 GFLOP/s",
        "  float32   100.0 GFLOP/s (now 40.0)",
        "  the higher of now and what was stored 2 hours ago",
    ]
    _print(now, now, None)
    assert "stored" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    done = moe_lens(place)
    assert done.returncode == 1
    assert "GB/s, read and written" in done.stdout
    assert "kept in" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "these ceilings are not kept. MOE_LENS_CACHE names another folder." in line


def test_no_such_device(tmp_path: Path) -> None:
    done = moe_lens(tmp_path, "--device", "cuda:7")
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no device cuda:7")
