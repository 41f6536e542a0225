"""Which backend a layer runs on: chosen, or forced by name, and always with the reason.

"auto" stands for the quickest that is there. A name stands for that backend or an error, never for
another. The environment variable MOE_LENS_RUNTIME replaces "auto".
"""

from __future__ import annotations

import difflib
import functools
import os
from typing import NamedTuple

import torch

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime import cpu, gemm
from moe_lens.runtime.gemm import choice, grouped

ENVIRONMENT = "MOE_LENS_RUNTIME"
NAMES = ("reference", "cpu", "cuda+grouped_mm", "cuda+triton", "cuda+loop")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Backend(NamedTuple):
    """A backend by name, and in one sentence why it is this one."""

    name: str
    why: str

    @property
    def product(self) -> str:
        """Name of the grouped matrix product of a "cuda+" backend; "" for the others."""
        return self.name.partition("+")[2]


class Shape(NamedTuple):
    """What the choice depends on: see `gemm.choice.choose`."""

    device: torch.device
    dtype: torch.dtype
    experts: int
    hidden: int
    intermediate: int
    aligned: bool = True


def resolve(wish: str, shape: Shape, slots: int | None = None) -> Backend:
    """The backend for a layer.

    Args:
        wish: "auto" or one of `NAMES`.
        shape: Of the layer.
        slots: Slots of the batch; None: many, as in prefill.

    Raises:
        RuntimeInputError: No such backend, or it does not run here; the message says why.
    """
    source = "asked for"
    if wish == "auto" and os.environ.get(ENVIRONMENT, "auto") != "auto":
        wish, source = os.environ[ENVIRONMENT], f"asked for by {ENVIRONMENT}"
    if wish == "auto":
        return _quickest(shape, slots)
    if wish not in NAMES:
        near = [name for name in NAMES if wish in name]
        near = near or difflib.get_close_matches(wish, NAMES, 1, 0.7)
        hint = f"did you mean {near[0]}? " if len(near) == 1 else ""
        raise RuntimeInputError(
            f"no backend {wish!r} ({source}): {hint}there are auto, {', '.join(NAMES)}"
        )
    if obstacle := _obstacle(wish, shape):
        raise RuntimeInputError(f"backend {wish} ({source}) does not run here: {obstacle}")
    return Backend(wish, f"{source}{_caution(wish, shape)}")


def _quickest(shape: Shape, slots: int | None) -> Backend:
    device, dtype = shape.device, shape.dtype
    if dtype not in DTYPES:
        return Backend("reference", f"neither kernels nor the CPU path take {dtype}")
    if device.type == "cpu":
        return Backend("cpu", f"the weights are on the CPU{_cpu_caution(dtype)}")
    if device.type != "cuda":
        return Backend("reference", f"there are no kernels for {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if missing := _missing_kernels(capability) or _too_many(shape):
        return Backend("reference", f"plain torch: {missing}")
    picked = choice.choose(
        capability,
        dtype,
        slots,
        shape.experts,
        shape.hidden,
        shape.intermediate,
        has_triton=gemm.has_triton(),
        aligned=shape.aligned,
    )
    return Backend(f"cuda+{picked.name}", picked.why)


def _obstacle(name: str, shape: Shape) -> str:
    """Why this backend cannot run here; "" if it can."""
    device, dtype = shape.device, shape.dtype
    if name == "reference":
        return ""
    if dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, and the weights are {dtype}"
    if device.type != name.partition("+")[0]:
        return f"the weights are on {device}"
    if name == "cpu":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if missing := _missing_kernels(capability) or _too_many(shape):
        return missing
    if name == "cuda+triton" and not gemm.has_triton():
        return "triton is not installed"
    if name == "cuda+grouped_mm":
        if not grouped.exists():
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm (2.10 has)"
        sizes = shape.experts, shape.hidden, shape.intermediate
        return grouped.obstacle(dtype, *sizes, aligned=shape.aligned)
    return ""


@functools.cache
def _missing_kernels(capability: tuple[int, int]) -> str:
    """What keeps the hand-written kernels from a device of this capability; "" if nothing."""
    from moe_lens.runtime.cuda import launch

    try:
        launch.architecture(capability)
    except RuntimeUnavailable as e:
        return str(e)
    return ""


def _too_many(shape: Shape) -> str:
    """What the hand-written kernels cannot take of this layer; "" if nothing."""
    from moe_lens.runtime.cuda import kernels

    if shape.experts > kernels.MAX_EXPERTS:
        return (
            f"the CUDA kernels take at most {kernels.MAX_EXPERTS} experts, and there are "
            f"{shape.experts}"
        )
    return ""


def _caution(name: str, shape: Shape) -> str:
    """What somebody who forces this backend should know."""
    if name == "cpu":
        return _cpu_caution(shape.dtype)
    if name == "cuda+loop":
        return "; it waits for the device to read counts, so no CUDA graph can hold it"
    if name == "cuda+grouped_mm":
        capability = torch.cuda.get_device_capability(shape.device)
        if not grouped.is_fast(capability, shape.dtype):
            return "; on this device torch loops on the host, so no CUDA graph can hold it"
    return ""


def _cpu_caution(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "; processors multiply float16 slowly: bfloat16 or float32 is quicker"
    if dtype == torch.bfloat16 and cpu.best_dtype() != dtype:
        return "; this processor has no bfloat16 products, so they are slow: float32 is quicker"
    return ""
