"""The CUDA kernels on the CPU: their own text through g++, launched by the code that launches them.

`kernels` computes grids and arguments and calls `launch`; `Lanes.launch` stands in for that, with
CPU tensors. Every tensor is copied between two guards, so that a write past it is found.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cuda_tools import compiler_of_cpp
from torch import Tensor

from moe_lens.runtime.cuda import compiler, kernels
from moe_lens.runtime.cuda.launch import Argument, packed_for

FLAGS = "-std=c++17 -O1 -fPIC -shared -fno-strict-aliasing -ffp-contract=off -U_FORTIFY_SOURCE"
GUARD = 256
BYTE = 0xA5


@functools.cache
def library(text: str | None = None) -> ctypes.CDLL:
    """The kernels (or an edited `text` of them), compiled for the CPU."""
    text = compiler.source() if text is None else text
    table = ",\n".join(f'kernel_of("{name}", {name})' for name in compiler.kernel_names())
    code = (
        f'#include "lanes.h"\n{text}\nstatic const std::vector<Kernel>& kernels() {{\n'
        f"static const std::vector<Kernel> all{{{table}}};\nreturn all;\n}}\n"
    )
    command = [compiler_of_cpp(), *FLAGS.split(), "-I", str(Path(__file__).parent)]
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/kernels.so"
        command += ["-x", "c++", "-", "-o", built]
        done = subprocess.run(command, input=code, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        loaded = ctypes.CDLL(built)
    loaded.lanes_launch.restype = ctypes.c_char_p
    return loaded


class Lanes:
    """Runs launches on the CPU, each with another order of threads."""

    def __init__(self, text: str | None = None) -> None:
        self.library = library(text)
        self.launches: list[str] = []

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        *arguments: Argument,
        device: torch.device,
        shared: int = 0,
    ) -> None:
        self.launches.append(kernel)
        guarded: dict[int, tuple[Tensor, np.ndarray]] = {}
        values = []
        for argument in arguments:
            value = packed_for(device.index, argument)
            if isinstance(argument, Tensor) and value:
                value = _guard(argument, guarded)
            wide = ctypes.c_int32 if isinstance(value, np.int32) else ctypes.c_int64
            values.append(wide(int(value)))
        failure = self.library.lanes_launch(
            kernel.encode(),
            *(ctypes.c_uint(n) for n in (*grid, threads, shared, len(self.launches))),
            len(values),
            (ctypes.c_int * len(values))(*map(ctypes.sizeof, values)),
            (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)),
        )
        assert failure is None, f"{kernel}: {failure.decode()}"
        for tensor, buffer in guarded.values():
            _unguard(kernel, tensor, buffer)


def _guard(tensor: Tensor, guarded: dict[int, tuple[Tensor, np.ndarray]]) -> int:
    """A copy of the tensor between guards, aligned as it is; its address."""
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if address not in guarded:
        whole = np.full(size + 2 * GUARD + 64, BYTE, np.uint8)
        begin = (address - whole.ctypes.data - GUARD) % 64
        buffer = whole[begin : begin + size + 2 * GUARD]
        ctypes.memmove(buffer.ctypes.data + GUARD, address, size)
        guarded[address] = (tensor, buffer)
    return guarded[address][1].ctypes.data + GUARD


def _unguard(kernel: str, tensor: Tensor, buffer: np.ndarray) -> None:
    assert (buffer[:GUARD] == BYTE).all(), f"{kernel} wrote before a tensor"
    assert (buffer[-GUARD:] == BYTE).all(), f"{kernel} wrote past a tensor"
    size = tensor.numel() * tensor.element_size()
    ctypes.memmove(tensor.data_ptr(), buffer.ctypes.data + GUARD, size)


@contextmanager
def on_cpu(text: str | None = None) -> Iterator[Lanes]:
    """Kernels run on CPU tensors. What they leave unwritten is NaN, or the largest integer."""
    lanes = Lanes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", lanes.launch)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
        try:
            yield lanes
        finally:
            torch.use_deterministic_algorithms(False)
