"""How experts are spread over ranks in a replay, and what its all-to-all sends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_lens.errors import ReplayError

FP8_BLOCK = 128
"""Elements that share one float32 scale, as DeepEP and DeepSeek-V3 quantise activations."""

DISPATCH_DTYPES = ("fp8", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Parallel:
    """An expert-parallel group, and its all-to-all.

    Attributes:
        ranks: Over which the experts of a layer are spread.
        placement: One of `placement.methods.METHODS`, or the path of a plan.
        replicas: Slots of a layer beyond one per expert; a plan has its own.
        nodes: Machines on which the ranks lie; a plan has its own.
        dedup: A token is sent once to each rank, and comes back as one row; otherwise once for each
            choice.
        dispatch_dtype: One of `DISPATCH_DTYPES`, as which rows are sent in the modelled all-to-all;
            None: as they are. Results come back as they are.
        all_to_all: A preset of `all_to_all.PRESETS` or the path of a fit; None: as
            `all_to_all.link_of` says.
        timeout_s: A real exchange that waits longer for a rank gives up.

    Raises:
        ReplayError: A number that is too small, or no such dtype.
    """

    ranks: int
    placement: str = "contiguous"
    replicas: int = 0
    nodes: int = 1
    dedup: bool = True
    dispatch_dtype: str | None = None
    all_to_all: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("nodes", 1), ("replicas", 0)):
            if getattr(self, name) < least:
                raise ReplayError(f"{name} is {least} or more, got {getattr(self, name)}.")
        if self.timeout_s <= 0:
            raise ReplayError(f"the timeout is above 0 seconds, got {self.timeout_s:g}.")
        if self.dispatch_dtype is not None and self.dispatch_dtype not in DISPATCH_DTYPES:
            raise ReplayError(
                f"dispatch dtype is {self.dispatch_dtype!r}: it is one of "
                f"{', '.join(DISPATCH_DTYPES)}."
            )


def row_bytes(width: int, dtype: str | None, own: torch.dtype) -> int:
    """Bytes of a row that is sent.

    Args:
        width: Its elements.
        dtype: One of `DISPATCH_DTYPES`. fp8 is a byte an element and a float32 scale for each
            `FP8_BLOCK` of them. None: `own`.
        own: The layer's.
    """
    if dtype == "fp8":
        return width + 4 * -(-width // FP8_BLOCK)
    kind = own if dtype is None else getattr(torch, dtype)
    return int(width * kind.itemsize)
