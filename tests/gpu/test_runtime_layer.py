"""Every backend of the MoE layer on a CUDA device, against float64, in a CUDA graph too."""

from __future__ import annotations

import pytest
import torch

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime import ceilings, reference, timing
from moe_lens.runtime.checks import check_ids
from moe_lens.runtime.gemm import grouped, tiles, triton_kernel
from moe_lens.runtime.layer import MoELayer

E, D, F, K = 16, 256, 192, 4
BACKENDS = ("reference", "cuda+grouped_mm", "cuda+triton", "cuda+loop")
CLOSE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)
ROUTINGS = ("even", "skewed", "dropped", "one expert", "none")


def make(dtype, backend, intermediate=F, hidden=D):
    return MoELayer.random(
        E, hidden, intermediate, dtype=dtype, device="cuda", seed=1, backend=backend
    )


def batch(tokens, dtype, routing, hidden=D, seed=0):
    """Tokens, int32 ids and gate weights, on the device."""
    torch.manual_seed(seed)
    share = torch.arange(1, E + 1.0) ** -(1.5 if routing == "skewed" else 0)
    ids = torch.multinomial(share.expand(tokens, E), K).int()
    if routing == "dropped":
        ids[torch.rand(tokens, K) < 0.5] = -1
    if routing == "one expert":
        ids[:] = -1
        ids[:, 1] = 3
    if routing == "none":
        ids[:] = -1
    check_ids(ids, E)
    return (
        torch.randn(tokens, hidden).to("cuda", dtype),
        ids.cuda(),
        torch.rand(tokens, K).cuda(),
    )


def error(layer, given, found):
    """Relative L2 distance from float64 on the same weights."""
    x, ids, weights = given
    wanted = reference.moe(
        x.double(), ids, weights.double(), layer._gate_up.double(), layer._down.double()
    )
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_close_to_float64(tokens, routing, backend, dtype):
    layer = make(dtype, backend)
    given = batch(tokens, dtype, routing)
    found = layer(*given)
    assert found.shape == (tokens, D)
    assert found.dtype == dtype
    assert error(layer, given, found) <= CLOSE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_twice_bit_for_bit(backend):
    layer, given = make(torch.bfloat16, backend), batch(700, torch.bfloat16, "skewed")
    assert torch.equal(layer(*given), layer(*given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    layer, (x, ids, weights) = make(torch.bfloat16, backend), batch(2, torch.bfloat16, "even")
    assert layer(x[:0], ids[:0], weights[:0]).shape == (0, D)


@pytest.mark.parametrize("hidden", [D, 200, 36])
@pytest.mark.parametrize("block", tiles.BLOCK_ROWS)
@DTYPES
def test_every_tile_of_the_triton_kernel(dtype, block, hidden):
    layer = make(dtype, "cuda+triton", intermediate=72, hidden=hidden)
    given = batch(150, dtype, "dropped", hidden=hidden)
    layer._block = block
    assert error(layer, given, layer(*given)) <= CLOSE[dtype]


def test_rows_of_no_slot_are_not_read_by_the_triton_kernel():
    layer, given = make(torch.bfloat16, "cuda+triton"), batch(90, torch.bfloat16, "dropped")
    plan = reference.plan(given[1], E)
    h = torch.randn(len(plan.slot_S), F, device="cuda", dtype=torch.bfloat16)
    tile = tiles.tile_for(32, torch.bfloat16, swiglu=False)
    clean = triton_kernel.grouped_mm(h, layer._down, plan.ends_E, tile)
    runs = int(plan.ends_E[-1])
    h[runs:] = torch.nan
    assert torch.equal(
        triton_kernel.grouped_mm(h, layer._down, plan.ends_E, tile)[:runs], clean[:runs]
    )


def graphs_hold(backend, dtype=torch.bfloat16):
    capability = torch.cuda.get_device_capability()
    return backend == "cuda+triton" or (
        backend == "cuda+grouped_mm" and grouped.is_fast(capability, dtype)
    )


@pytest.mark.parametrize("tokens", [16, 700])
@pytest.mark.parametrize("backend", ["cuda+grouped_mm", "cuda+triton"])
def test_a_graph_holds_for_another_routing(backend, tokens):
    if not graphs_hold(backend):
        pytest.skip("torch's grouped_mm waits for the host on this device")
    layer = make(torch.bfloat16, backend)
    static = batch(tokens, torch.bfloat16, "even")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*static)
    for seed, routing in enumerate(ROUTINGS):
        given = batch(tokens, torch.bfloat16, routing, seed=seed + 10)
        for old, new in zip(static, given, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(*given))
        assert error(layer, given, y) <= CLOSE[torch.bfloat16]


@pytest.mark.parametrize("backend", ["cuda+grouped_mm", "cuda+triton"])
def test_nothing_waits_for_the_device(backend, no_waiting):
    if not graphs_hold(backend):
        pytest.skip("torch's grouped_mm waits for the host on this device")
    layer, given = make(torch.bfloat16, backend), batch(64, torch.bfloat16, "even")
    layer(*given)
    no_waiting(True)
    layer(*given)
    no_waiting(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_are_the_call_in_stages(backend):
    layer, given = make(torch.bfloat16, backend), batch(100, torch.bfloat16, "dropped")
    parts = layer.parts(*given)
    inside = {"plan", "gate_up", "down", "combine"}
    assert set(parts) == (inside if backend == "cuda+triton" else inside | {"permute", "act"})
    assert torch.equal(parts["combine"](), layer(*given))


def test_timing_in_graphs_and_without():
    layer, given = make(torch.bfloat16, "cuda+triton"), batch(700, torch.bfloat16, "even")
    works = {"layer": lambda: layer(*given), "again": lambda: layer(*given)}
    for graphs in (True, False):
        found = timing.interleaved(works, 5, "cuda", graphs=graphs)
        assert all(1e-7 < s < 1 for times in found.values() for s in times)
        assert timing.noise_floor(found["layer"], found["again"]) < 1


def test_what_waits_for_the_device_is_refused_for_graphs():
    layer, given = make(torch.bfloat16, "cuda+loop"), batch(64, torch.bfloat16, "even")
    with pytest.raises(RuntimeInputError, match="slow cannot be captured in a CUDA graph"):
        timing.interleaved({"slow": lambda: layer(*given)}, 1, "cuda")
    # and the device still works
    assert error(layer, given, layer(*given)) <= CLOSE[torch.bfloat16]


def test_ceilings_of_this_device():
    found = ceilings.measure("cuda")
    assert found.copy_bytes_per_s > 1e10
    assert found.matmul_flop_per_s["bfloat16"] > found.matmul_flop_per_s["float32"] / 2
    assert found.device_name == torch.cuda.get_device_name()
    assert found.driver


def test_more_than_fits_is_said_before_allocating():
    before = torch.cuda.memory_allocated()
    with pytest.raises(RuntimeInputError, match="GB free"):
        MoELayer.random(10**6, 8192, 8192, dtype=torch.bfloat16, device="cuda", seed=0)
    assert torch.cuda.memory_allocated() == before
