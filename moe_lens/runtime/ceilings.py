"""What a device can do at most, measured: how fast it copies, and how fast it multiplies.

Physical floors are computed from these two. On random data, since a GPU multiplies zeros faster
than anything real. On a CPU the seconds are the process's CPU time, as in all timings there.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from moe_lens.runtime.timing import Work, interleaved
from moe_lens.runtime.weights import free_bytes

REPEATS = 10
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Of one side of the copy: far above any cache."""

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows, columns and depth of the matrix product."""


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of one device, and what they were measured on.

    Attributes:
        copy_bytes_per_s: Of a large copy, bytes read plus bytes written.
        matmul_flop_per_s: By dtype ("bfloat16", ...): 2 n^3 operations of a large square product.
        device: "cpu" or "cuda".
        device_name: As it calls itself.
        cores: Processor cores that this process may use.
        threads: Threads that torch uses on the CPU.
        driver: Version of the NVIDIA driver; "" without one.
        versions: Of python, torch, the CUDA that torch was built for, and triton; "" if missing.
        clocks_mhz: "sm", "memory" and "sm_max", as nvidia-smi saw them right after measuring; empty
            where it cannot tell.
        measured_ns: When, in nanoseconds since 1970.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]
    device: str
    device_name: str
    cores: int
    threads: int
    driver: str
    versions: dict[str, str]
    clocks_mhz: dict[str, float]
    measured_ns: int


def measure(device: torch.device | str) -> Ceilings:
    """Measure a device. Takes a few seconds; the best of several repeats counts."""
    device = torch.device(device)
    copied = _copy_size(device)
    copy_s = _best(_copy(copied, device), device)
    rates = {}
    size = MATRIX.get(device.type, MATRIX["cpu"])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        rates[str(dtype)[6:]] = 2 * size**3 / _best(_product(a, b, out), device)
    driver, clocks = _nvidia_smi(device)
    return Ceilings(
        copy_bytes_per_s=2 * copied / copy_s,
        matmul_flop_per_s=rates,
        device=device.type,
        device_name=device_name(device),
        cores=_cores(),
        threads=torch.get_num_threads(),
        driver=driver,
        versions=versions(),
        clocks_mhz=clocks,
        measured_ns=time.time_ns(),
    )


def device_name(device: torch.device | str) -> str:
    """What the processor or the GPU calls itself."""
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what takes part in a timing; "" for what is not there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or ""
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = ""
    return found


def _best(work: Work, device: torch.device) -> float:
    return min(interleaved({"work": work}, REPEATS, device, cold=False)["work"])


def _copy(size: int, device: torch.device) -> Work:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Work:
    return lambda: torch.mm(a, b, out=out)


def _copy_size(device: torch.device) -> int:
    """The size asked for, or an eighth of what is free."""
    wanted = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    free = free_bytes(device)
    return wanted if free is None else max(2**20, min(wanted, free // 8))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _nvidia_smi(device: torch.device) -> tuple[str, dict[str, float]]:
    """Driver and clocks, as far as nvidia-smi is there and tells them."""
    if device.type != "cuda":
        return "", {}
    # nvidia-smi counts all GPUs, torch those that it was given: only the UUID is the same.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    fields = {"sm": "clocks.sm", "memory": "clocks.mem", "sm_max": "clocks.max.sm"}
    query = ",".join(["driver_version", *fields.values()])
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i"]
    which = f"GPU-{uuid}" if uuid else str(device.index or 0)
    try:
        done = subprocess.run(
            [*command, which], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "", {}
    driver, *numbers = [cell.strip() for cell in done.stdout.partition("\n")[0].split(",")]
    clocks = {}
    for name, number in zip(fields, numbers, strict=False):
        if number.replace(".", "", 1).isdigit():  # "[N/A]" where it cannot tell
            clocks[name] = float(number)
    return driver, clocks
