"""The ceilings of a device: measured once, kept in the user's cache, and used by every replay.

A ceiling is the most that a device was ever seen to do: what is measured again replaces what is
kept only where it is higher. A measurement on a busy machine then spoils nothing.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from moe_lens.runtime.ceilings import Ceilings, device_name, measure
from moe_lens.runtime.cuda.compiler import cache_folder


def ceilings_path(device: torch.device) -> Path:
    """The file of a device; on a CPU, of so many threads."""
    name = device_name(device)
    if device.type == "cpu":
        name += f" {torch.get_num_threads()} threads"
    return cache_folder() / "ceilings" / f"{slug(name)}.json"


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread inside: its CPU time is then what work takes on a core of its own."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "device"


def stored(device: torch.device) -> Ceilings | None:
    """What was measured before on this device, with this torch; None where there is no such."""
    try:
        raw = json.loads(ceilings_path(device).read_text(encoding="utf-8"))
        found = Ceilings(**{f.name: raw[f.name] for f in fields(Ceilings)})
        usable = found.bytes_per_s > 0 and min(found.matmul_flop_per_s.values()) > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if usable and found.versions.get("torch") == torch.__version__ else None


def store(ceilings: Ceilings, device: torch.device) -> Path:
    """Keep them for later.

    Raises:
        OSError: The cache cannot be written.
    """
    path = ceilings_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(ceilings), indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def highest(now: Ceilings, before: Ceilings | None) -> Ceilings:
    """What was measured now, with the rates of an earlier measurement where those are higher."""
    if before is None:
        return now
    rates = {
        dtype: max(rate, before.matmul_flop_per_s.get(dtype, 0.0))
        for dtype, rate in now.matmul_flop_per_s.items()
    }
    return replace(
        now,
        copy_bytes_per_s=max(now.copy_bytes_per_s, before.copy_bytes_per_s),
        read_bytes_per_s=max(now.read_bytes_per_s, before.read_bytes_per_s),
        matmul_flop_per_s=rates,
    )


def ago(then_ns: int, now_ns: int | None = None) -> str:
    """How long ago a time is, in the largest unit of which it is one or more."""
    seconds = ((time.time_ns() if now_ns is None else now_ns) - then_ns) // 10**9
    for unit, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= unit:
            n = seconds // unit
            return f"{n:,} {name}{'s' if n != 1 else ''} ago"
    return "just now"


def ceilings_of(device: torch.device) -> tuple[Ceilings, str]:
    """The stored ceilings, or ones that are measured now, and which of the two, in words."""
    found = stored(device)
    if found is not None:
        return found, f"stored {ago(found.measured_ns)}"
    found = measure(device)
    try:
        store(found, device)
    except OSError as e:
        return found, f"measured now; not stored ({e.strerror or e})"
    return found, "measured now, and stored"
