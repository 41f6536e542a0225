"""Runs a kernel on torch's current stream.

The kernels are compiled and loaded once for each device, at the first launch there, which therefore
must not be inside the capture of a CUDA graph. A later launch neither allocates nor waits.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime.cuda import compiler

Argument = Tensor | int | np.int64 | None
"""A pointer (None: null), an int (32 bits) or, as `np.int64`, a long long."""

LEGACY_STREAM = 1
"""`CU_STREAM_LEGACY`: the default stream by a name that is no null pointer."""

_kernels: dict[int, dict[str, Any]] = {}
_lock = threading.Lock()
_streams: dict[int, Any] = {}
_thread = threading.local()


def launch(
    kernel: str,
    grid: tuple[int, int],
    threads: int,
    *arguments: Argument,
    device: torch.device,
    shared: int = 0,
) -> None:
    """Run `kernel` with `grid` blocks of `threads` threads and `shared` bytes of shared memory.

    Raises:
        RuntimeInputError: A tensor is not contiguous on that device.
        RuntimeUnavailable: There is no CUDA device, or the kernels do not compile or load there.
    """
    index = _index(device)
    with torch.cuda.device(index):
        loaded = _kernels.get(index) or load(index)
        _bind(index)
        from cuda.core import launch as start

        handle = torch.cuda.current_stream(index).cuda_stream or LEGACY_STREAM
        packed = [packed_for(index, argument) for argument in arguments]
        start(_stream(handle), _config(grid, threads, shared), loaded[kernel], *packed)


def load(index: int) -> dict[str, Any]:
    """Compile and load every kernel for a device, so that none is loaded inside a capture.

    Raises:
        RuntimeUnavailable: They do not compile or load, or the current stream is being captured.
    """
    with _lock:
        if index in _kernels:
            return _kernels[index]
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeUnavailable(
                "the CUDA kernels cannot be loaded while a graph is being captured: run the "
                "captured code once before, as torch.cuda.graph asks for anyway"
            )
        arch = architecture(torch.cuda.get_device_capability(index))
        code = compiler.cubin(compiler.source(), arch)
        with torch.cuda.device(index):
            _bind(index)
            _kernels[index] = _load(code, arch)
        return _kernels[index]


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for, on a device of this capability.

    Raises:
        RuntimeUnavailable: cuda.core, NVRTC or the driver is missing or too old, or the device is.
    """
    toolkit = compiler.nvrtc_version()  # first: it says if a package is missing
    driver = _driver_version()
    if driver < toolkit[0]:
        raise RuntimeUnavailable(too_old(driver, toolkit))
    return compiler.arch_of(capability)


def too_old(driver: int, toolkit: tuple[int, int]) -> str:
    """What to do about a driver for CUDA `driver`, with an NVRTC that is newer by a major version.

    A driver loads the cubins of every toolkit of its own major version, and of older ones.
    """
    return (
        f"the NVIDIA driver is for CUDA {driver}, and does not load what NVRTC "
        f"{toolkit[0]}.{toolkit[1]} compiles: update the driver, or install an older compiler "
        f'with pip install "cuda-core[cu{driver}]" "cuda-bindings<{driver + 1}"'
    )


def _load(code: bytes, arch: str) -> dict[str, Any]:
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    try:
        module = ObjectCode.from_cubin(code, name="moe_lens")
        kernels = {name: module.get_kernel(name) for name in compiler.kernel_names()}
        for kernel in kernels.values():
            # By default the driver loads a kernel when it is first used: that may be in a capture.
            status, function = driver.cuKernelGetFunction(kernel.handle)
            if int(status) == 0:
                (status,) = driver.cuFuncLoad(function)
            if int(status) != 0:
                raise RuntimeError(str(status))
    except Exception as e:  # CUDAError is not public
        raise RuntimeUnavailable(
            f"the driver did not load the kernels compiled for {arch} by NVRTC "
            f"{'.'.join(map(str, compiler.nvrtc_version()))}: update the driver ({e})"
        ) from e
    return kernels


def _driver_version() -> int:
    """The CUDA major version that the driver is for."""
    from cuda.bindings import driver

    try:
        status, version = driver.cuDriverGetVersion()
    except Exception as e:  # the bindings' own class, which differs between their versions
        raise RuntimeUnavailable(f"no NVIDIA driver was found: install one ({e})") from e
    if int(status) != 0:
        raise RuntimeUnavailable(f"the NVIDIA driver does not work ({status})")
    return int(version) // 1000


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        raise RuntimeUnavailable(f"the CUDA kernels take tensors of a CUDA device, got {device}")
    if not torch.cuda.is_available():
        # Asked before cuda.core is, which may wait for ever for a driver that is not there.
        raise RuntimeUnavailable(
            "torch sees no CUDA device: install an NVIDIA driver and a CUDA build of torch"
        )
    index: int | None = device.index  # torch's own annotation leaves None out
    return torch.cuda.current_device() if index is None else index


def _bind(index: int) -> None:
    """Make the device's context that of this thread: torch does so lazily, cuda.core not at all."""
    bound = _thread.__dict__.setdefault("bound", set())
    if index not in bound:
        from cuda.core import Device

        Device(index).set_current()
        bound.add(index)


def _stream(handle: int) -> Any:
    if handle not in _streams:
        from cuda.core import Stream

        _streams[handle] = Stream.from_handle(handle)
    return _streams[handle]


@functools.lru_cache(maxsize=4096)
def _config(grid: tuple[int, int], threads: int, shared: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=threads, shmem_size=shared)


def packed_for(index: int | None, argument: Argument) -> int | np.int32 | np.int64:
    """As cuda.core takes it: a Python int is a pointer, a NumPy scalar is a value of its width.

    Raises:
        RuntimeInputError: A tensor lies on another device than `index`, or not in one piece.
    """
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        if argument.device.index != index or not argument.is_contiguous():
            where = "" if argument.device.index == index else f" and on {argument.device}"
            raise RuntimeInputError(
                f"all tensors must be contiguous on device {index}; one is "
                f"{argument.dtype} {list(argument.shape)}{where}"
            )
        return argument.data_ptr()
    if isinstance(argument, np.int64):
        return argument
    return np.int32(argument)
