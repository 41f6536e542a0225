"""An MoE layer's weights: taken from a model, or random; and what memory they need.

E experts, D hidden, F an expert's intermediate size.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError

SILU_GATED = 0.596
"""Root mean square of silu(a) * b for independent standard normal a and b: sqrt(E[silu(a)^2])."""

_SILU = {"silu", "SiLU", "SiLUActivation", "swish"}


def weight_bytes(experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> int:
    """Bytes of the weights of a layer: 3 matrices of D x F an expert."""
    return 3 * experts * hidden * intermediate * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Memory that a tensor on this device could take now; None where nobody can say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    if device.type != "cpu":
        return None
    try:  # what could be had, page cache given back included; sysconf counts only what lies idle
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def random_weights(
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Normally distributed weights, [E, 2F, D] and [E, D, F].

    They are scaled so that standard normal inputs give outputs of root mean square 1 an expert.
    Never zeros: on those a GPU runs faster than on any real data, since fewer bits flip.

    Raises:
        RuntimeInputError: A size below 1, a dtype that nothing is computed in, or more than the
            device has free; nothing is allocated.
    """
    if min(experts, hidden, intermediate) < 1:
        raise RuntimeInputError(
            f"experts, hidden and intermediate must be at least 1, got {experts}, {hidden} and "
            f"{intermediate}"
        )
    if not _computes(dtype):
        raise RuntimeInputError(
            f"a layer computes in float32, bfloat16, float16 or float64, got {dtype}"
        )
    needed, free = weight_bytes(experts, hidden, intermediate, dtype), free_bytes(device)
    if free is not None and needed > free:
        raise RuntimeInputError(
            f"{experts} experts of {hidden} x {intermediate} in {str(dtype)[6:]} take "
            f"{needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: use a smaller "
            "shape, or fewer experts"
        )
    generator = torch.Generator(device).manual_seed(seed)
    gate_up = torch.empty(experts, 2 * intermediate, hidden, dtype=dtype, device=device)
    gate_up.normal_(0, hidden**-0.5, generator=generator)
    down = torch.empty(experts, hidden, intermediate, dtype=dtype, device=device)
    down.normal_(0, intermediate**-0.5 / SILU_GATED, generator=generator)
    return gate_up, down


def weights_of(module: Any) -> tuple[Tensor, Tensor]:
    """The weights of an experts module of transformers, not copied: [E, 2F, D] and [E, D, F].

    Known to fit are those of Mixtral, Qwen3-MoE and OLMoE; others fit that hold and use their
    weights in the same way.

    Raises:
        RuntimeInputError: The module computes something else; the message says what.
    """
    name = type(module).__name__
    if obstacle := _obstacle(module):
        raise RuntimeInputError(f"{name} {obstacle}: its weights cannot be taken")
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    check_weights(gate_up, down, name)
    return gate_up, down


def check_weights(gate_up: Tensor, down: Tensor, name: str = "a layer") -> None:
    """Refuse weights that are not [E, 2F, D] and [E, D, F], of one kind on one device.

    Raises:
        RuntimeInputError: What is wrong.
    """
    shapes = f"gate_up {list(gate_up.shape)} and down {list(down.shape)}"
    fits = gate_up.dim() == 3 and down.dim() == 3
    if fits:
        experts, two_f, hidden = gate_up.shape
        fits = two_f % 2 == 0 and down.shape == (experts, hidden, two_f // 2)
        fits = fits and min(experts, two_f, hidden) > 0
    if not fits:
        raise RuntimeInputError(
            f"{name} has weights {shapes}, wanted [experts, 2 * intermediate, hidden] and "
            "[experts, hidden, intermediate]"
        )
    if gate_up.dtype != down.dtype or gate_up.device != down.device:
        raise RuntimeInputError(
            f"{name} has gate_up {gate_up.dtype} on {gate_up.device} and down {down.dtype} on "
            f"{down.device}: both must be alike"
        )
    if not _computes(gate_up.dtype):
        raise RuntimeInputError(
            f"{name} has weights of {gate_up.dtype}: quantised weights are not supported, "
            "dequantise them first"
        )
    if gate_up.device.type == "meta":
        raise RuntimeInputError(f"{name} has weights on the meta device: load them first")


def _computes(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are multiplied as they are."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def _obstacle(module: Any) -> str:
    """What keeps a module from being silu(x @ gate.T) * (x @ up.T) @ down.T; "" if nothing."""
    for needed in ("gate_up_proj", "down_proj"):
        if not isinstance(getattr(module, needed, None), Tensor):
            return f"has no tensor {needed}"
    biases = [n for n, _ in module.named_parameters() if "bias" in n]
    if biases or getattr(module, "has_bias", False):
        return f"has biases ({', '.join(biases) or 'has_bias'})"
    if getattr(module, "is_transposed", False):
        return "stores its weights transposed, [experts, in, out]"
    if not getattr(module, "is_concatenated", True):
        return "interleaves gate and up"
    if not getattr(module, "has_gate", True):
        return "has no gate"
    if getattr(module, "has_post_expert_norm", False):
        return "normalises what its experts return"
    if getattr(module, "_is_expert_parallel", False):
        return "holds only a part of its layer's experts"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return f"has a gate of its own ({gate.__qualname__})"
    activation = getattr(module, "act_fn", None)
    named = getattr(activation, "__name__", type(activation).__name__)
    return "" if named in _SILU else f"uses the activation {named}, not SiLU"
