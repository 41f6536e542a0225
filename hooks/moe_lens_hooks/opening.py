"""Opening a trace for writing: the folder, the rank's lock, a fresh meta or a resumed one."""

from __future__ import annotations

import os
import platform
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_lens.errors import TraceError, TraceWriteError
from moe_lens.trace import layout
from moe_lens.trace.lock import RankLock
from moe_lens.trace.meta import Attempt, Meta, read_meta
from moe_lens.trace.recover import next_value, recover_rank
from moe_lens.trace.schema import TABLES
from moe_lens_hooks.adapter import MoELayer


@dataclass
class Opened:
    """A rank of a trace that this process may write, and where its numbers go on."""

    lock: RankLock
    meta: Meta
    next_step: int = 0
    next_window: int = 0
    next_sequence: int = 0


def check_options(keys: Sequence[str], weights: str, layout: str, **reactions: str) -> None:
    """Refuse options of `record` that it does not know.

    Args:
        keys: Names for the user's columns of `sequences`.
        weights: "bf16" or "exact".
        layout: "bs" or "sb".
        reactions: "raise" or "warn", by name.

    Raises:
        ValueError: One of them is something else, or a key is a column already.
    """
    taken = set(keys) & {"run", "rank", *TABLES["sequences"].schema.names}
    if taken:
        raise ValueError(f"keys {sorted(taken)} are columns of moe_lens; choose other names.")
    if weights not in ("bf16", "exact"):
        raise ValueError(f'{weights=} must be "bf16" or "exact"')
    if layout not in ("bs", "sb"):
        raise ValueError(f'{layout=} must be "bs" or "sb"')
    for name, value in reactions.items():
        if value not in ("raise", "warn"):
            raise ValueError(f'{name}={value!r} must be "raise" or "warn"')


def check_layout(layers: Sequence[MoELayer], layout: str) -> None:
    """Refuse a layout that is not the model's.

    Raises:
        ValueError: A layer is known to flatten its batch otherwise.
    """
    if other := next((x for x in layers if x.layout not in (None, layout)), None):
        raise ValueError(
            f"{type(other.block).__name__} ({other.info.adapter}) flattens its batch as "
            f'"{other.layout}", not "{layout}": pass record(..., layout="{other.layout}"), or '
            "tokens would be counted for other sequences than theirs."
        )


def open_for_writing(run: Path, fresh: Meta, *, resume: bool) -> Opened:
    """Take the rank's lock; a dead writer's leftovers are sealed when resuming.

    Raises:
        TraceError: The folder holds something already and `resume` is off, or `resume` is on and
            what it holds was recorded with other keys or weights.
        TraceLocked: Another process writes this rank.
        TraceWriteError: The folder cannot be made or written.
    """
    known = layout.meta_path(run, fresh.rank).exists()
    if not resume and _occupied(run, fresh):
        raise TraceError(
            f"{run} is not empty. Record into a new folder, or pass resume=True to go on with the "
            "trace that is in it."
        )
    try:
        lock = RankLock(run, fresh.rank)
    except OSError as e:
        raise TraceWriteError(f"cannot write the trace {run}: {e}") from e
    try:
        if not known:
            return Opened(lock, fresh)
        return _resume(run, lock, fresh)
    except BaseException:
        lock.release()
        raise


def _resume(run: Path, lock: RankLock, fresh: Meta) -> Opened:
    meta = read_meta(layout.meta_path(run, fresh.rank))
    for name in ("keys", "weights"):
        if getattr(meta, name) != getattr(fresh, name):
            raise TraceError(
                f"{run} was recorded with {name}={getattr(meta, name)!r}; it cannot be resumed "
                f"with {getattr(fresh, name)!r}."
            )
    recover_rank(run, meta)
    number = 1 + max((a.attempt for a in meta.attempts), default=-1)
    meta.attempts.append(Attempt(number, time.time_ns()))
    meta.sampling, meta.versions = fresh.sampling, fresh.versions
    return Opened(
        lock,
        meta,
        next_step=next_value(run, meta, "steps", "step"),
        next_window=next_value(run, meta, "steps", "window"),
        next_sequence=next_value(run, meta, "sequences", "sequence"),
    )


def _occupied(run: Path, fresh: Meta) -> bool:
    """Something is there that is not of the other ranks of this launch."""
    if run.exists() and not run.is_dir():
        raise TraceError(f"{run} is a file; a trace is a folder.")
    lock = layout.lock_path(run, fresh.rank)
    if not any(p.is_file() and p != lock for p in run.rglob("*")):
        return False  # nothing, or what a recorder left that could not begin
    others = layout.ranks(run)
    if fresh.world == 1 or fresh.rank in others or not (others or (run / "_open").is_dir()):
        return True
    return any(read_meta(layout.meta_path(run, r)).run_id != fresh.run_id for r in others)


def root_modules(model: object) -> list[nn.Module]:
    """What is recorded: the model, or its chunks, as a list; empty for None.

    Raises:
        TypeError: Something is not a torch module.
    """
    given: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
    given = [] if model is None else given
    wrong = [m for m in given if not isinstance(m, nn.Module)]
    if wrong or (not given and model is not None):
        got = f"{type(wrong[0]).__name__} {wrong[0]!r}" if wrong else "an empty list"
        raise TypeError(
            f"record(model, …) takes a torch.nn.Module, a list of them, or None; got {got:.80}. "
            "Load the model first."
        )
    return given


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torch.distributed; (0, 1) without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def run_id(world: int) -> str:
    """One id for all ranks of a launch, found without talking to them."""
    if world == 1:
        return uuid.uuid4().hex
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return "/".join(os.environ.get(n, "") for n in names)


def versions() -> dict[str, str]:
    """What ran: Python, torch, and the model library if it is loaded."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("moe_lens", "transformers"):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found
