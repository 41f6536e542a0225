"""What a launch passes to cuda.core, and what it says where there is nothing to launch on."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.cuda_on_cpu import on_cpu
from support.cuda_tools import need_nvrtc

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime.cuda import compiler, kernels, launch

CPU = torch.device("cpu")


def test_arguments_have_their_width_in_memory():
    need_nvrtc()
    from cuda.core._kernel_arg_handler import ParamHolder

    x = torch.arange(3)
    arguments = (x, None, -7, np.int64(1 << 40))
    packed = [launch.packed_for(None, argument) for argument in arguments]
    assert [type(value) for value in packed] == [int, int, np.int32, np.int64]
    holder = ParamHolder(packed)
    places = (ctypes.c_void_p * 4).from_address(holder.ptr)
    kinds = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64)
    values = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]
    assert values == [x.data_ptr(), 0, -7, 1 << 40]


def test_an_int_that_is_no_int32_is_no_argument():
    with pytest.raises(OverflowError):
        launch.packed_for(None, 1 << 31)


@pytest.mark.parametrize(
    "tensor", [torch.empty(3, device="meta"), torch.zeros(4, 4).T[:2], torch.zeros(4)[::2]]
)
def test_tensors_elsewhere_or_in_pieces_are_refused(tensor):
    index = 1 if tensor.is_meta else None
    with pytest.raises(RuntimeInputError, match="must be contiguous on device"):
        launch.packed_for(index, tensor)


def test_grid_block_and_shared_memory():
    need_nvrtc()
    config = launch._config((70000, 3), 96, 1160)
    assert (config.grid, config.block, config.shmem_size) == ((70000, 3, 1), (96, 1, 1), 1160)


def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(RuntimeUnavailable, match="tensors of a CUDA device, got cpu"):
        kernels.plan(torch.zeros(2, 1, dtype=torch.int32), 2)


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match="torch sees no CUDA device"):
        launch.launch("moe_plan_small", (1, 1), 32, device=torch.device("cuda", 0))


@pytest.fixture
def a_device(monkeypatch):
    """As much of a device as loading asks for."""
    monkeypatch.setattr(launch, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launch, "_driver_version", lambda: 13)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    return monkeypatch


def test_a_driver_older_than_the_compiler(a_device):
    a_device.setattr(launch, "_driver_version", lambda: 12)
    says = r'driver is for CUDA 12.*NVRTC 13\.0.*update the driver.*"cuda-core\[cu12\]"'
    with pytest.raises(RuntimeUnavailable, match=says):
        launch.load(0)


def test_a_capture_must_not_load(a_device):
    a_device.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeUnavailable, match="run the captured code once before"):
        launch.load(0)


def test_a_driver_that_refuses_the_code(a_device):
    need_nvrtc()
    import cuda.core

    class Refusing:
        @staticmethod
        def from_cubin(code: bytes, name: str) -> None:
            raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    a_device.setattr(cuda.core, "ObjectCode", Refusing)
    says = r"did not load the kernels compiled for sm_90a by NVRTC 13\.0.*NO_BINARY"
    with pytest.raises(RuntimeUnavailable, match=says):
        launch._load(b"", "sm_90a")


def test_importing_needs_neither_cuda_nor_triton():
    code = (
        "import sys; sys.modules.update({'cuda': None, 'triton': None});"
        "import moe_lens.runtime.cuda.kernels"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_flush_reads_every_word():
    with on_cpu() as lanes:
        for at in (0, 4 * 700 - 1):
            words = torch.zeros(4 * 701, dtype=torch.int32)
            words[[at, -1]] = torch.tensor([6, 9], dtype=torch.int32)
            arguments = (words, np.int64(700))  # the last word is not the kernel's
            lanes.launch("moe_flush_l2", (2, 1), 256, *arguments, device=CPU)
            assert words[0] == 6
            assert words[-1] == 9


def test_the_flush_is_of_more_than_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 1_000_001
        multi_processor_count = 3

    launches = []
    monkeypatch.setattr(kernels, "_flushed", {})
    monkeypatch.setattr(kernels, "launch", lambda *a, **options: launches.append((a, options)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    device = torch.device("cpu", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeUnavailable, match="once before a graph captures it"):
        kernels.flush_l2(device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernels.flush_l2(device)
    kernels.flush_l2(device)
    (first, options), (second, _) = launches
    kernel, grid, _, buffer, words = first
    assert (kernel, grid, options) == ("moe_flush_l2", (24, 1), {"device": device})
    assert 16 * int(words) == buffer.numel() == 4_000_000
    assert second[3] is buffer
