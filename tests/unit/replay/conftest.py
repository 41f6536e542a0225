"""A cache folder of the test's own, with ceilings in it: nothing is measured but what is tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lens.replay import machine
from moe_lens.runtime.ceilings import Ceilings, device_name, versions

CPU = torch.device("cpu")


@pytest.fixture
def ceilings() -> Ceilings:
    return Ceilings(
        copy_bytes_per_s=10e9,
        read_bytes_per_s=8e9,
        matmul_flop_per_s={"bfloat16": 200e9, "float16": 50e9, "float32": 100e9},
        device="cpu",
        device_name=device_name(CPU),
        cores=2,
        threads=1,
        driver="",
        versions=versions(),
        clocks_mhz={},
        measured_ns=1,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ceilings: Ceilings) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOE_LENS_CACHE", str(folder))
    with machine.one_thread(CPU):
        machine.store(ceilings, CPU)
    return folder
