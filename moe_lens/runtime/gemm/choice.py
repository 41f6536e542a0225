"""Which grouped matrix product runs on a CUDA device: one pure function, for measuring to change.

T tokens, K top-k, E experts, D hidden, F an expert's intermediate size, S = T * K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_lens.runtime.gemm import grouped

DECODE_SLOTS = 512
"""Up to this many slots a layer streams weights and little else, and every launch saved counts: the
Triton kernel gathers rows as it loads them and gates before it stores, two launches less than
`grouped_mm` needs. From vLLM's experience (vllm#29354: without a permute 17 % quicker at one token,
equal from 48 tokens on), not yet measured here."""


class Choice(NamedTuple):
    """A grouped matrix product by name, and why it."""

    name: str
    why: str


def choose(
    capability: tuple[int, int],
    dtype: torch.dtype,
    slots: int | None,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    has_triton: bool = True,
    aligned: bool = True,
) -> Choice:
    """The product for a layer of this shape.

    Args:
        capability: Compute capability of the device.
        dtype: Of weights and activations.
        slots: S; None: many, as in prefill.
        experts: E.
        hidden: D.
        intermediate: F.
        has_triton: Whether triton can be imported.
        aligned: Whether the weights begin where `grouped_mm` can read them (`grouped.is_aligned`).
    """
    sm = f"sm_{capability[0]}{capability[1]}"
    name = str(dtype).removeprefix("torch.")
    obstacle = grouped.obstacle(dtype, experts, hidden, intermediate, aligned=aligned)
    fast = grouped.is_fast(capability, dtype) and not obstacle
    if not has_triton:
        if fast:
            return Choice("grouped_mm", f"torch's kernel for {sm} and {name}; triton is not there")
        slow = f"torch has no kernel for {sm} and {name}"
        return Choice("loop", f"{obstacle or slow}, and triton is not installed")
    if not fast:
        slow = f"torch's grouped_mm waits for the host on {sm} with {name}"
        return Choice("triton", obstacle or slow)
    if slots is not None and slots <= DECODE_SLOTS:
        return Choice("triton", f"{slots} slots: gathering and gating inside saves launches")
    return Choice("grouped_mm", f"torch's kernel for {sm} and {name}")
