"""How quick an all-to-all between processes is: measured, fitted, and checked on skewed traffic.

Latency and bandwidth come from balanced all-to-alls of many sizes, by least squares of relative
errors. Skewed ones are not fitted: how far the line is from them says how far it can be believed.

R ranks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moe_lens.errors import ReplayError
from moe_lens.replay.ep.all_to_all import KIND, busiest, fit_path
from moe_lens.replay.ep.world import World
from moe_lens.runtime.ceilings import device_name, versions

LEAST = 2**12
MOST = {"gloo": 2**24, "nccl": 2**28}
"""Bytes that the busiest rank sends, from 4 KiB by factors of four."""

REPEATS = 7
LOOPBACK = (
    "These are times of gloo over the loopback of this machine: they say nothing of NCCL, NVLink "
    "or a network."
)


@dataclass(frozen=True)
class Errors:
    """Relative errors of the line: of how many all-to-alls, their median and the worst."""

    count: int
    median: float
    worst: float


@dataclass(frozen=True)
class Fit:
    """An all-to-all that was measured.

    Attributes:
        ranks: R, on one machine.
        backend: nccl or gloo.
        latency_s: Of one with hardly a byte.
        bytes_per_s: Of one rank, one way.
        balanced: Errors on what was fitted.
        skewed: Errors on what was not: one hot destination, and Zipf's law.
        most_bytes: Of the busiest rank, in the largest.
        note: What it stands for.
    """

    device_name: str
    ranks: int
    backend: str
    latency_s: float
    bytes_per_s: float
    balanced: Errors
    skewed: Errors
    most_bytes: int
    note: str
    versions: dict[str, str]
    measured_ns: int


def measure(world: World) -> Fit:
    """Measure this group of processes; every rank calls it, and has the result.

    Raises:
        ReplayError: One process alone, several machines, or times that do not grow with sizes.
    """
    if world.size < 2:
        raise ReplayError("an all-to-all takes two processes or more: --nproc 2, or torchrun.")
    if world.size != int(os.environ.get("LOCAL_WORLD_SIZE", world.size)):
        raise ReplayError(
            "these processes are on several machines, and one bandwidth does not describe both "
            "what is within a machine and what is between them. Measure on one machine."
        )
    most = MOST[world.backend]
    sizes = [LEAST * 4**i for i in range(32) if LEAST * 4**i <= most]
    flat = [balanced(world.size, size) for size in sizes]
    skew = [make(world.size, size) for size in sizes[1::2] for make in (one_hot, zipf)]
    taken = [_seconds(bytes_RR, world) for bytes_RR in (*flat, *skew)]
    loads = [busiest(bytes_RR) for bytes_RR in (*flat, *skew)]
    latency_s, bytes_per_s = line(loads[: len(flat)], taken[: len(flat)])
    said = [latency_s + load / bytes_per_s for load in loads]
    own = device_name(world.device)
    return Fit(
        device_name=own,
        ranks=world.size,
        backend=world.backend,
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        balanced=errors(said[: len(flat)], taken[: len(flat)]),
        skewed=errors(said[len(flat) :], taken[len(flat) :]),
        most_bytes=max(loads),
        note=LOOPBACK if world.backend == "gloo" else f"NCCL, {world.size} x {own}, one machine",
        versions=versions(),
        measured_ns=time.time_ns(),
    )


def balanced(ranks: int, size: int) -> NDArray[np.int64]:
    """Every rank sends `size` bytes, as many to each of the others [R, R]."""
    bytes_RR = np.full((ranks, ranks), size // (ranks - 1))
    np.fill_diagonal(bytes_RR, 0)
    return bytes_RR


def one_hot(ranks: int, size: int) -> NDArray[np.int64]:
    """The first rank receives `size` bytes from the others together, and nobody else anything."""
    bytes_RR = np.zeros((ranks, ranks), np.int64)
    bytes_RR[1:, 0] = size // (ranks - 1)
    return bytes_RR


def zipf(ranks: int, size: int) -> NDArray[np.int64]:
    """Destination d receives 1 / (d + 1) of what the first receives, which is `size` bytes."""
    share_R = 1 / np.arange(1, ranks + 1)
    bytes_RR = np.tile(share_R * size / (ranks - 1), (ranks, 1)).astype(np.int64)
    np.fill_diagonal(bytes_RR, 0)
    return bytes_RR


def line(loads: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bytes a second of t = latency + load / bandwidth, no latency below 0.

    Minimises the sum of squares of (said - t) / t: small all-to-alls count as much as large ones.

    Raises:
        ReplayError: Times do not grow with loads.
    """
    x_N, t_N = np.asarray(loads, np.float64), np.asarray(seconds, np.float64)
    (latency, slope), *_ = np.linalg.lstsq(
        np.stack([1 / t_N, x_N / t_N], axis=1), np.ones(len(t_N)), rcond=None
    )
    if latency < 0:
        latency, slope = 0.0, (x_N / t_N).sum() / ((x_N / t_N) ** 2).sum()
    if slope <= 0:
        raise ReplayError(
            "larger all-to-alls took no longer than small ones, so no bandwidth can be told: the "
            "machine is too busy, measure again."
        )
    return float(latency), float(1 / slope)


def errors(said: Sequence[float], taken: Sequence[float]) -> Errors:
    """How far a line is from what was measured, relative to that."""
    off = [abs(a - b) / b for a, b in zip(said, taken, strict=True)]
    return Errors(len(off), median(off), max(off))


def _seconds(bytes_RR: NDArray[np.int64], world: World) -> float:
    """Median seconds of an all-to-all, each time those of the slowest rank."""
    sent, received = bytes_RR[world.rank].tolist(), bytes_RR[:, world.rank].tolist()
    out = torch.randint(0, 255, (sum(sent),), dtype=torch.uint8, device=world.device)
    back = torch.empty(sum(received), dtype=torch.uint8, device=world.device)
    taken = []
    for _ in range(REPEATS + 2):
        dist.barrier()
        before = time.perf_counter()
        dist.all_to_all_single(back, out, received, sent)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        taken.append(time.perf_counter() - before)
    own = median(taken[2:])  # the first two connect and warm up
    return max(times[0] for times in world.gathered([own]))


def keep(fit: Fit) -> Path:
    """Keep it where a replay of as many ranks looks for it.

    Raises:
        OSError: The cache cannot be written.
    """
    path = fit_path(fit.device_name, fit.ranks, fit.backend)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    said: dict[str, Any] = {"kind": KIND, **asdict(fit)}
    try:
        temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path
