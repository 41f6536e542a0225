"""The processes of a real exchange: how one joins them, and what they agree on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_lens.errors import MoeLensError, ReplayError


class OtherRankFailed(ReplayError):
    """Another rank has said what is wrong; this one has nothing to add."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: Its number.
        size: How many there are.
        device: Where its experts are.
        backend: nccl or gloo.
    """

    rank: int
    size: int
    device: torch.device
    backend: str

    def agreed(self, error: MoeLensError | None) -> None:
        """Go on only if no rank has an error; else this one has left the group.

        Raises:
            ReplayError: On the first rank that has one, with its message.
            OtherRankFailed: On every other.
        """
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(said, None if error is None else str(error))
        failed = [rank for rank, text in enumerate(said) if text is not None]
        if not failed:
            return
        # Every rank is here and will end: one that ends with the group open may be aborted by it.
        dist.destroy_process_group()
        if self.rank == failed[0]:
            where = "" if len(failed) == self.size else f"rank {self.rank}: "
            raise ReplayError(f"{where}{said[self.rank]}") from error
        raise OtherRankFailed(f"rank {failed[0]} could not go on: {said[failed[0]]}")

    def first_says(self, yes: bool) -> bool:
        """What the first rank says."""
        said = torch.tensor([int(yes)], device=self.device)
        dist.broadcast(said, src=0)
        return bool(said.item())

    def gathered(self, numbers: list[float]) -> list[list[float]]:
        """The numbers of every rank, by rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return [of.tolist() for of in every]


@contextmanager
def joined(device: str | None, timeout_s: float) -> Iterator[World]:
    """Join the processes that torchrun started.

    Args:
        device: "cpu", "cuda", or None for a GPU where there is one for each local process.
        timeout_s: Give up where another process is silent for so long.

    Raises:
        ReplayError: They cannot be joined, or one of them ended.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    where = _device(device, local, beside)
    backend = "nccl" if where.type == "cuda" else "gloo"
    with exchanging(timeout_s):
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=where if where.type == "cuda" else None,
        )
    with exchanging(timeout_s):
        yield World(rank, size, where, backend)
        # Only where all went well: taking leave of a process that is gone may wait for it.
        dist.destroy_process_group()


@contextmanager
def exchanging(timeout_s: float) -> Iterator[None]:
    """Say in one line that another process is gone.

    Raises:
        ReplayError: It is.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError) or not _is_of_peers(e):
            raise
        said = re.sub(r"^(\[[^\]]*\.cc:\d+\]\s*)+", "", str(e).splitlines()[0])[:120]
        raise ReplayError(
            f"another rank ended, or said nothing for {timeout_s:g} s ({said})."
        ) from e


def _is_of_peers(error: Exception) -> bool:
    """Whether an error comes from the exchange, and not from what is computed."""
    text = str(error).lower()
    words = ("gloo", "connection", "timed out", "timeout", "nccl", "store", "socket", "peer")
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def _device(asked: str | None, local: int, beside: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        asked = "cuda" if count >= beside else "cpu"
    if asked == "cpu":
        return torch.device("cpu")
    if asked != "cuda":
        raise ReplayError(f"Ranks run on cpu or cuda, one GPU each; got --device {asked}.")
    if local >= count:
        raise ReplayError(
            f"Rank {local} of this machine has no GPU: torch sees {count} here. Start as many "
            "processes, or take --device cpu."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def environment(device: torch.device, backend: str) -> dict[str, Any]:
    """What the exchange ran on, for metadata."""
    nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"backend": backend, "device": device.type, "machines": max(1, nodes)}
