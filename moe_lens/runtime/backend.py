"""Which backend a layer runs on: chosen, or forced by name, and always with the reason.

"auto" stands for the quickest that is there. A name stands for that backend or an error, never for
another. The environment variable MOE_LENS_RUNTIME replaces "auto".
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

from moe_lens.errors import RuntimeInputError
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
        raise RuntimeInputError(
            f"no backend {wish!r} ({source}): there are auto, {', '.join(NAMES)}"
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
    if missing := _missing_kernels() or _too_many(shape):
        return Backend("reference", f"the CUDA kernels cannot be had: {missing}")
    picked = choice.choose(
        torch.cuda.get_device_capability(device),
        dtype,
        slots,
        shape.experts,
        shape.hidden,
        shape.intermediate,
        has_triton=gemm.has_triton(),
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
    if missing := _missing_kernels() or _too_many(shape):
        return missing
    if name == "cuda+triton" and not gemm.has_triton():
        return "triton is not installed"
    if name == "cuda+grouped_mm":
        if not grouped.exists():
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm (2.10 has)"
        return grouped.obstacle(dtype, shape.experts, shape.hidden, shape.intermediate)
    return ""


@functools.cache
def _missing_kernels() -> str:
    """What the hand-written kernels lack; "" if nothing."""
    try:
        found = find_spec("cuda.core")
    except ModuleNotFoundError:  # not even the package above it
        found = None
    return "" if found else "cuda.core is not installed: pip install 'moe-lens[kernels]'"


def _too_many(shape: Shape) -> str:
    """What the hand-written kernels cannot take of this layer; "" if nothing."""
    from moe_lens.runtime.cuda import kernels

    if shape.experts > kernels.MAX_EXPERTS:
        return f"they take at most {kernels.MAX_EXPERTS} experts, and there are {shape.experts}"
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
