"""Every kernel compiles for the devices we name, in registers alone. Needs no device."""

from __future__ import annotations

import re
import subprocess

import pytest
from support.cuda_tools import ARCHITECTURES, cuobjdump, need_nvrtc

from moe_lens.errors import RuntimeUnavailable
from moe_lens.runtime.cuda import compiler

USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
THREADS = {"moe_plan_small": 1024, "moe_select": 512}


@pytest.fixture(autouse=True)
def a_compiler(tmp_path, monkeypatch):
    need_nvrtc()
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path / "cache"))


def usage(arch: str, folder) -> dict[str, dict[str, int]]:
    """What each kernel takes: registers, and bytes of stack, shared and local memory."""
    tool = cuobjdump()
    path = folder / f"{arch}.cubin"
    path.write_bytes(compiler.cubin(compiler.source(), arch))
    command = [tool, "--dump-resource-usage", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ("registers", "stack", "shared", "local")
    found = USAGE.findall(said)
    return {name: dict(zip(names, map(int, rest), strict=True)) for name, *rest in found}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch, tmp_path):
    found = usage(arch, tmp_path)
    assert set(found) == set(compiler.kernel_names())
    for name, took in found.items():
        assert took["stack"] == took["local"] == 0, (name, took)
        assert took["shared"] <= 1024, (name, took)  # what the system itself reserves
        # A block must find its registers: an SM has 65,536.
        assert took["registers"] * THREADS.get(name, 256) <= 65536, (name, took)


def test_the_architecture_reaches_the_compiler():
    # An instruction of Hopper's own, which no other architecture takes.
    text = (
        'extern "C" __global__ void gate() { asm volatile("wgmma.fence.sync.aligned;"); }'
        "  // only on sm_90a"
    )
    assert compiler.cubin(text, "sm_90a")[:4] == b"\x7fELF"
    for arch in ("sm_80", "sm_100a"):
        with pytest.raises(RuntimeUnavailable, match=r"(?s)did not compile.*wgmma"):
            compiler.cubin(text, arch)


def test_what_nvrtc_says_is_in_the_error():
    with pytest.raises(RuntimeUnavailable, match=r'(?s)broken\.cu\(1\): error: .*"nonsense"'):
        compiler.cubin('#line 1 "broken.cu"\nnonsense x;', "sm_80")


def test_an_architecture_that_nvrtc_does_not_know():
    with pytest.raises(RuntimeUnavailable, match=r"does not know sm_990a.*a newer one may"):
        compiler.cubin("__device__ int x;", "sm_990a")
