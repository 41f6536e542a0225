"""The Triton kernel without a GPU: its arithmetic interpreted, its code for four architectures.

The interpreter runs in a process of its own, since triton decides when it is imported, and in
float32, since it multiplies the bits of bfloat16 (triton#11584).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moe_lens.runtime.gemm import tiles

pytestmark = pytest.mark.slow

SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program may have: CUDA C++ Programming Guide, Compute Capabilities."""

MATRIX_UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def without(what):
    """Skip, but not where CI runs: there a broken setup must not pass as nothing to test."""
    if os.environ.get("MOE_LENS_REQUIRE_BROWSER"):
        pytest.fail(f"{what} is missing", pytrace=False)
    pytest.skip(f"{what} is missing")


@pytest.fixture
def triton():
    if find_spec("triton") is None:
        without("triton")
    import triton

    return triton


@pytest.fixture
def cuobjdump(triton):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        without("cuobjdump of triton")
    return tool


INTERPRETED = """
import torch
from moe_lens.runtime import reference
from moe_lens.runtime.backend import Backend
from moe_lens.runtime.gemm import tiles, triton_kernel
from moe_lens.runtime.layer import MoELayer

def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())

torch.manual_seed(0)
worst = 0.0
# Rows that do not fill a tile, widths that are no multiple of one, experts without rows, dropped
# slots, one token, more tiles than a group has.
for T, K, E, D, F in [(5, 2, 3, 40, 24), (1, 1, 1, 16, 16), (9, 3, 8, 32, 18), (24, 1, 2, 16, 20)]:
    x, w, down = torch.randn(T, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    ids = torch.rand(T, E).argsort(1)[:, :K].int()
    if T > 1:
        ids[0, 0] = -1
        ids[ids == E - 1] = -1
    plan = reference.plan(ids, E)
    runs = int(plan.ends_E[-1])
    h = reference.swiglu(
        reference.grouped_mm(reference.permute(x.double(), plan), w.double(), plan.ends_E)
    )
    y = reference.grouped_mm(h, down.double(), plan.ends_E)
    for tile in (tiles.Tile(16, 16, 16, 4, 2), tiles.Tile(32, 16, 32, 4, 2)):
        fused = triton_kernel.grouped_mm(
            x, w, plan.ends_E, tile, slot_S=plan.slot_S, top_k=K, swiglu=True
        )
        poisoned = h.float()  # rows of no slot are NaN, as the reference leaves them
        plain = triton_kernel.grouped_mm(poisoned, down, plan.ends_E, tile)
        worst = max(worst, error(fused[:runs], h[:runs]), error(plain[:runs], y[:runs]))

# What lies behind a row of weights is the next row: a width that fills no step must not read it.
down[:, 3] = torch.nan
plain = triton_kernel.grouped_mm(poisoned, down, plan.ends_E, tile)
assert torch.isnan(plain[:runs, 3]).all()
assert torch.isfinite(plain[:runs, torch.arange(16) != 3]).all()

# The whole layer on this backend, on the device that the interpreter has.
layer = MoELayer.random(4, 40, 24, dtype=torch.float32, device="cpu", seed=0)
given = torch.randn(6, 40), torch.rand(6, 4).argsort(1)[:, :2].int(), torch.rand(6, 2)
wanted = layer(*given)
layer.backend_for = lambda slots: Backend("cuda+triton", "")
parts = layer.parts(*given)
assert list(parts) == ["plan", "gate_up", "down", "combine"]
assert torch.equal(parts["combine"](), layer(*given))
layer.expect([12, 0, 0, 0])
worst = max(worst, error(layer(*given), wanted))

empty = triton_kernel.grouped_mm(x[:0], down.transpose(1, 2).contiguous(), plan.ends_E * 0, tile)
assert empty.shape == (0, F)
print("worst", worst)
"""


def test_in_the_interpreter_it_is_the_reference(triton):
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("its interpreter does not run beside this numpy (triton#9171)")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2e-6


def compiled(arch, tile, dtype, *, swiglu, depth=2048):
    """The kernel as a layer of 64 experts launches it: for tokens of top-8, or for rows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_lens.runtime.gemm import triton_kernel

    top_k = 8 if swiglu else 0
    constants = triton_kernel.arguments(64, depth, tile, top_k=top_k, swiglu=swiglu)
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), POINTER[dtype])
    pointers |= {"slot_ptr": "*i32", "ends_ptr": "*i32"}
    counts = ("row_tiles", "experts", "columns", "depth", "x_stride", "w_stride")
    signature = pointers | dict.fromkeys(counts, "i32") | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    aligned = [*pointers, "columns", "depth", "x_stride", "w_stride"]
    source = ASTSource(
        triton_kernel.grouped_gemm,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = triton_kernel.options(tile)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(kernel, cuobjdump, tmp_path):
    """Registers, stack and local memory of a compiled kernel."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    done = subprocess.run(
        [cuobjdump, "--dump-resource-usage", binary], check=True, capture_output=True, text=True
    )
    usage = done.stdout.partition("Function grouped_gemm")[2]
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}


@pytest.mark.parametrize("arch", SHARED_KB, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [
        (torch.bfloat16, tiles.BLOCK_ROWS),
        (torch.float16, (16, 128)),
        (torch.float32, (16, 128)),
    ],
    ids=["bf16", "fp16", "fp32"],
)
def test_every_kernel_compiles_without_a_spill(arch, dtype, blocks, cuobjdump, tmp_path):
    for rows in blocks:
        for swiglu in (True, False):
            tile = tiles.tile_for(rows, dtype, swiglu=swiglu)
            kernel = compiled(arch, tile, dtype, swiglu=swiglu)
            used = resources(kernel, cuobjdump, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, (tile, used)
            assert 0 < used["REG"] <= 255
            assert kernel.metadata.shared <= SHARED_KB[arch] * 1024
            if rows >= 64 and dtype != torch.float32:
                assert MATRIX_UNIT[arch] in kernel.asm["ptx"]


@pytest.mark.parametrize("arch", SHARED_KB, ids=lambda arch: f"sm_{arch}")
def test_a_width_that_is_no_multiple_of_a_step_compiles_too(arch, cuobjdump, tmp_path):
    tile = tiles.tile_for(64, torch.bfloat16, swiglu=True)
    kernel = compiled(arch, tile, torch.bfloat16, swiglu=True, depth=2000)
    used = resources(kernel, cuobjdump, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
