"""What a device can do at most, measured: how fast it copies, reads and multiplies.

Physical floors are computed from these. On random data, since a GPU multiplies zeros faster than
anything real. On a CPU the seconds are the process's CPU time, as in all timings there: a neighbour
on the same cores takes none of it, but slows it (caches, memory, clocks), for seconds at a time. So
everything is tried several times, with pauses between, and the best counts.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from moe_lens.runtime.timing import Work, interleaved
from moe_lens.runtime.weights import free_bytes

REPEATS = 3
"""Measurements of each work in a try."""

TRIES = 4
PAUSE_S = {"cpu": 1.0, "cuda": 0.1}
"""Between two tries: a burst of a neighbour's may be over by then."""

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Of one side of the copy, and of what is read: far above any cache."""

WIDTH = 4096
"""Columns of the matrix that is read by a product with a vector."""

LOAD_S = 2.0
"""A CUDA device multiplies for so long while its clocks are read."""

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows, columns and depth of the matrix product."""

PLAIN_MATRIX = 256
"""The same where a CPU has no quick path for a dtype: its loop is as fast for a small one."""

PLAIN_FLOP_PER_S = 10e9
"""A product of one thread that is slower than this is such a loop."""


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of one device, and what they were measured on.

    Attributes:
        copy_bytes_per_s: Of a large copy, bytes read plus bytes written.
        read_bytes_per_s: Of reading alone, as decoding reads weights: the quicker of a large sum
            and a large matrix times a vector.
        matmul_flop_per_s: By dtype ("bfloat16", ...): 2 n^3 operations of a large square product.
        device: "cpu" or "cuda".
        device_name: As it calls itself.
        cores: Processor cores that this process may use.
        threads: Threads that torch uses on the CPU.
        driver: Version of the NVIDIA driver; "" without one.
        versions: Of python, torch, the CUDA that torch was built for, and triton; "" if missing.
        clocks_mhz: "sm", "memory" and "sm_max", as nvidia-smi saw them while the device multiplied;
            empty where it cannot tell.
        measured_ns: When, in nanoseconds since 1970.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]
    device: str
    device_name: str
    cores: int
    threads: int
    driver: str
    versions: dict[str, str]
    clocks_mhz: dict[str, float]
    measured_ns: int

    @property
    def bytes_per_s(self) -> float:
        """The byte ceiling of a floor: a copy's or reading's, whichever is higher."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


def measure(device: torch.device | str) -> Ceilings:
    """Measure a device. Takes several seconds: the best of `TRIES` tries counts."""
    device = torch.device(device)
    moved = _size(device)
    sizes, products = {}, {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name, size = str(dtype)[6:], _side(dtype, device)
        sizes[name], products[name] = size, _product(dtype, size, device)
    best = _best({**_moves(moved, device), **products}, device)
    driver, clocks = _under_load(products["bfloat16"], best["bfloat16"], device)
    return Ceilings(
        copy_bytes_per_s=2 * moved / best["copy"],
        read_bytes_per_s=moved / min(best["sum"], best["vector"]),
        matmul_flop_per_s={name: 2 * size**3 / best[name] for name, size in sizes.items()},
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


def _best(works: Mapping[str, Work], device: torch.device) -> dict[str, float]:
    """Seconds of each work: the least of all repeats of all tries."""
    best = dict.fromkeys(works, math.inf)
    for turn in range(TRIES):
        if turn:
            time.sleep(PAUSE_S.get(device.type, 0.0))
        for name, taken in interleaved(works, REPEATS, device, cold=False).items():
            best[name] = min(best[name], *taken)
    return best


def _moves(size: int, device: torch.device) -> dict[str, Work]:
    """A copy of `size` bytes, and two works that read as many and write next to nothing."""
    numbers = torch.randint(2**31, (size // 8,), dtype=torch.int64, device=device)
    target, total = torch.empty_like(numbers), torch.empty((), dtype=torch.int64, device=device)
    rows = size // (2 * WIDTH)
    some = torch.randn(min(rows, 64), WIDTH, device=device).to(torch.bfloat16)
    matrix = some.repeat(-(-rows // len(some)), 1)[:rows]
    vector, product = some[0].clone(), matrix.new_empty(rows)
    return {
        "copy": lambda: target.copy_(numbers),
        "sum": lambda: torch.sum(numbers, 0, out=total),
        "vector": lambda: torch.mv(matrix, vector, out=product),
    }


def _product(dtype: torch.dtype, size: int, device: torch.device) -> Work:
    """A product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _side(dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a product that does not take seconds: float16 does on most CPUs."""
    if device.type != "cpu":
        return MATRIX.get(device.type, MATRIX["cpu"])
    tried = {"product": _product(dtype, PLAIN_MATRIX, device)}
    seconds = min(interleaved(tried, REPEATS, device)["product"])
    is_plain = 2 * PLAIN_MATRIX**3 / seconds < PLAIN_FLOP_PER_S
    return PLAIN_MATRIX if is_plain else MATRIX["cpu"]


def _size(device: torch.device) -> int:
    """Bytes to move: those asked for, or a sixteenth of what is free, in whole rows of a matrix."""
    wanted = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    free = free_bytes(device)
    row = 2 * WIDTH
    return wanted if free is None else max(2**20, min(wanted, free // 16)) // row * row


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _under_load(work: Work, seconds: float, device: torch.device) -> tuple[str, dict[str, float]]:
    """Driver and clocks while the device has work: an idle one clocks as it likes.

    Args:
        work: What it does meanwhile.
        seconds: That one of them takes.
        device: Which.
    """
    if device.type != "cuda":
        return _nvidia_smi(device)
    for _ in range(math.ceil(LOAD_S / seconds)):
        work()
    seen = _nvidia_smi(device)
    torch.cuda.synchronize(device)
    return seen


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
