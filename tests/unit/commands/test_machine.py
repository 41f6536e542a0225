"""`moe-lens machine` measures, says, and keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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
    assert set(said["matmul_flop_per_s"]) == {"bfloat16", "float16", "float32"}
    assert said["threads"] == 1


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
