"""The layer: close to float64, the same twice, whole where little is to do, and plain-spoken."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from moe_lens.errors import RuntimeInputError, RuntimeUnavailable
from moe_lens.runtime import backend as backends
from moe_lens.runtime import ops, reference, weights
from moe_lens.runtime.gemm import choice
from moe_lens.runtime.layer import MoELayer

E, D, F, K = 8, 64, 48, 3
BOTH = pytest.mark.parametrize("backend", ["reference", "cpu"])


def make(dtype=torch.float32, **options):
    return MoELayer.random(E, D, F, dtype=dtype, device="cpu", seed=3, **options)


def batch(tokens, dtype=torch.float32, seed=0):
    """Tokens, the ids of K experts each, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=generator).to(dtype)
    ids = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K].int()
    return x, ids, torch.rand(tokens, K, generator=generator)


def naive(layer, x, ids, weights):
    """One token and one expert at a time, in float64."""
    gate_up, down = layer._gate_up.double(), layer._down.double()
    y = torch.zeros(len(x), D, dtype=torch.float64)
    for t, k in torch.nonzero(ids >= 0).tolist():
        gate, up = (gate_up[ids[t, k]] @ x[t].double()).chunk(2)
        y[t] += weights[t, k].double() * (down[ids[t, k]] @ (gate * torch.sigmoid(gate) * up))
    return y


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@BOTH
@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 2, 200])
def test_close_to_float64(backend, dtype, close, tokens):
    layer = make(dtype, backend=backend)
    x, ids, weights = batch(tokens, dtype)
    y = layer(x, ids, weights)
    assert y.dtype == dtype
    assert y.shape == (tokens, D)
    assert error(y, naive(layer, x, ids, weights)) < close


@BOTH
def test_dropped_slots_add_nothing(backend):
    layer = make(backend=backend)
    x, ids, weights = batch(50)
    ids[torch.rand(50, K) < 0.5] = -1
    ids[7] = -1
    y = layer(x, ids, weights)
    assert error(y, naive(layer, x, ids, weights)) < 1e-6
    assert (y[7] == 0).all()


@BOTH
@pytest.mark.parametrize("expert", [0, E - 1])
def test_all_tokens_on_one_expert(backend, expert):
    layer = make(backend=backend)
    x, _, weights = batch(40)
    ids = torch.full((40, 1), expert, dtype=torch.int32)
    y = layer(x, ids, weights[:, :1])
    assert error(y, naive(layer, x, ids, weights)) < 1e-6


@BOTH
def test_no_tokens_and_nothing_to_run(backend):
    layer = make(backend=backend)
    x, ids, weights = batch(4)
    assert layer(x[:0], ids[:0], weights[:0]).shape == (0, D)
    assert (layer(x, torch.full_like(ids, -1), weights) == 0).all()
    assert layer(x[:0], ids[:0], weights[:0]).dtype == torch.float32


@BOTH
def test_the_same_twice_bit_for_bit(backend):
    layer = make(torch.bfloat16, backend=backend)
    given = batch(300, torch.bfloat16)
    assert torch.equal(layer(*given), layer(*given))


@BOTH
def test_a_token_whose_numbers_are_not_finite_spoils_no_other(backend):
    layer = make(backend=backend)
    x, ids, weights = batch(30)
    clean = layer(x, ids, weights)
    x[11] = torch.nan
    y = layer(x, ids, weights)
    assert torch.isnan(y[11]).all()
    others = torch.arange(30) != 11
    assert torch.equal(y[others], clean[others])


def test_dropless_is_a_capacity_without_an_end():
    layer = make()
    x, ids, weights = batch(60)
    whole = ops.capacity(ids, E, ids.numel()).expert_ids_TK
    tight = ops.capacity(ids, E, 3).expert_ids_TK
    assert torch.equal(layer(x, whole, weights), layer(x, ids, weights))
    assert not torch.equal(layer(x, tight, weights), layer(x, ids, weights))


def test_float64_runs_on_the_reference():
    layer = make(torch.float64)
    x, ids, weights = batch(20, torch.float64)
    assert layer.backend.name == "reference"
    assert error(layer(x, ids, weights), naive(layer, x, ids, weights)) < 1e-14


def test_views_are_taken_as_they_are():
    layer = make()
    x, ids, weights = batch(20)
    wide = torch.randn(20, 2 * D)
    wide[:, ::2] = x
    turned = ids.t().contiguous().t(), weights.t().contiguous().t()
    assert torch.equal(layer(wide[:, ::2], *turned), layer(x, ids, weights))


@BOTH
def test_parts_are_the_call_in_stages(backend):
    layer = make(backend=backend)
    given = batch(25)
    parts = layer.parts(*given)
    assert list(parts) == ["plan", "permute", "gate_up", "act", "down", "combine"]
    assert torch.equal(parts["combine"](), layer(*given))
    assert parts["gate_up"]().shape == (25 * K, 2 * F)
    with pytest.raises(RuntimeInputError, match="no tokens"):
        layer.parts(*(t[:0] for t in given))


def test_random_outputs_are_of_order_one():
    layer = MoELayer.random(4, 512, 256, dtype=torch.float32, device="cpu", seed=0)
    ids = torch.randint(4, (256, 1), dtype=torch.int32)
    y = layer(torch.randn(256, 512), ids, torch.ones(256, 1))
    assert 0.9 < float(y.pow(2).mean().sqrt()) < 1.1
    assert (layer._gate_up != 0).float().mean() > 0.999


def test_a_seed_is_a_layer():
    given = batch(9)
    again = MoELayer.random(E, D, F, dtype=torch.float32, device="cpu", seed=3)
    other = MoELayer.random(E, D, F, dtype=torch.float32, device="cpu", seed=4)
    assert torch.equal(make()(*given), again(*given))
    assert not torch.equal(make()(*given), other(*given))


def test_the_backend_says_what_and_why(monkeypatch):
    assert make().backend == ("cpu", "the weights are on the CPU")
    assert "slowly" in make(torch.float16).backend.why
    assert make(backend="reference").backend == ("reference", "asked for")
    monkeypatch.setenv("MOE_LENS_RUNTIME", "reference")
    assert make().backend == ("reference", "asked for by MOE_LENS_RUNTIME")
    assert make(backend="cpu").backend.name == "cpu"  # an argument is nearer than the environment
    monkeypatch.setenv("MOE_LENS_RUNTIME", "auto")
    assert make().backend.name == "cpu"


def test_a_processor_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(backends.cpu, "best_dtype", lambda: torch.float32)
    assert "no bfloat16 products" in make(torch.bfloat16).backend.why


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("cuda+triton", "cuda.triton .asked for by MOE_LENS_RUNTIME. does not run here: .* on cpu"),
        ("gpu", "no backend 'gpu' .asked for by MOE_LENS_RUNTIME.: there are auto, reference"),
        ("triton", r"no backend 'triton' .*: did you mean cuda\+triton\? there are auto, ref"),
        ("cuda+tirton", r"did you mean cuda\+triton\?"),
    ],
)
def test_an_impossible_wish_is_an_error(wish, said, monkeypatch):
    monkeypatch.setenv("MOE_LENS_RUNTIME", wish)
    with pytest.raises(RuntimeInputError, match=said):
        make()


def test_the_cpu_path_takes_no_float64():
    with pytest.raises(RuntimeInputError, match=r"cpu .asked for. does not run here: .*float64"):
        make(torch.float64, backend="cpu")


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A device of some capability, as far as choosing a backend looks."""

    def pretend(capability, *, triton=True, kernels=""):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(backends.gemm, "has_triton", lambda: triton)
        monkeypatch.setattr(backends, "_missing_kernels", lambda _: kernels)

    return pretend


def shape(dtype=torch.bfloat16, hidden=2048):
    return backends.Shape(torch.device("cuda"), dtype, 64, hidden, 1024)


def test_a_gpu_runs_what_is_quick_on_it(pretend_cuda):
    pretend_cuda((9, 0))
    assert backends.resolve("auto", shape()).name == "cuda+grouped_mm"
    assert backends.resolve("auto", shape(), 64 * 8).name == "cuda+triton"
    assert backends.resolve("auto", shape(), 64 * 8 + 1).name == "cuda+grouped_mm"
    assert backends.resolve("auto", shape(torch.float16)).name == "cuda+triton"
    assert backends.resolve("auto", shape(hidden=2044)).name == "cuda+triton"
    assert backends.resolve("auto", shape(torch.float64)).name == "reference"
    assert backends.resolve("cuda+loop", shape()).why.endswith("so no CUDA graph can hold it")
    pretend_cuda((8, 0))
    assert backends.resolve("auto", shape()).name == "cuda+triton"
    assert "loops on the host" in backends.resolve("cuda+grouped_mm", shape()).why


def test_a_gpu_without_triton_or_kernels(pretend_cuda):
    pretend_cuda((8, 0), triton=False)
    assert backends.resolve("auto", shape()).name == "cuda+loop"
    with pytest.raises(RuntimeInputError, match="triton is not installed"):
        backends.resolve("cuda+triton", shape())
    pretend_cuda((9, 0), kernels="cuda.core is not installed: pip install 'moe-lens[kernels]'")
    found = backends.resolve("auto", shape())
    assert found.name == "reference"
    assert "moe-lens[kernels]" in found.why
    with pytest.raises(RuntimeInputError, match=r"cuda.core is not installed"):
        backends.resolve("cuda+grouped_mm", shape())
    with pytest.raises(RuntimeInputError, match="the weights are on cuda"):
        backends.resolve("cpu", shape())


def test_grouped_mm_needs_aligned_rows(pretend_cuda):
    pretend_cuda((9, 0))
    with pytest.raises(
        RuntimeInputError, match="multiple of 16 bytes, and widths are 2044 and 1024"
    ):
        backends.resolve("cuda+grouped_mm", shape(hidden=2044))


def test_grouped_mm_needs_weights_that_begin_where_it_can_read(pretend_cuda):
    pretend_cuda((9, 0))
    odd = shape()._replace(aligned=False)
    found = backends.resolve("auto", odd)
    assert found.name == "cuda+triton"
    assert "begin at a multiple of 16 bytes" in found.why
    with pytest.raises(RuntimeInputError, match="begin at a multiple of 16 bytes, and one does"):
        backends.resolve("cuda+grouped_mm", odd)


def test_a_layer_knows_where_its_weights_begin():
    def weights(*shape, offset):
        return torch.zeros(offset + math.prod(shape))[offset:].view(shape)

    for offset, aligned in ((0, True), (1, False), (4, True)):
        layer = MoELayer(weights(2, 8, 4, offset=0), weights(2, 4, 4, offset=offset))
        assert layer._shape.aligned is aligned
        layer = MoELayer(weights(2, 8, 4, offset=offset), weights(2, 4, 4, offset=0))
        assert layer._shape.aligned is aligned


@pytest.mark.parametrize("fails", ["device", "driver", "package"])
def test_auto_falls_back_where_the_kernels_cannot_be_had(fails, monkeypatch):
    """Whatever of cuda.core, NVRTC, the driver and the device is too old or not there."""
    from moe_lens.runtime.cuda import compiler, launch

    def missing():
        raise RuntimeUnavailable("NVRTC, which compiles the CUDA kernels, was not found")

    capability = (7, 5) if fails == "device" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(
        compiler, "nvrtc_version", missing if fails == "package" else lambda: (13, 0)
    )
    monkeypatch.setattr(launch, "_driver_version", lambda: 12 if fails == "driver" else 13)
    backends._missing_kernels.cache_clear()
    try:
        found = backends.resolve("auto", shape())
        with pytest.raises(RuntimeInputError) as refused:
            backends.resolve("cuda+triton", shape())
    finally:
        backends._missing_kernels.cache_clear()
    said = {"device": "8.0 or later, and this device has 7.5", "package": "NVRTC, which compiles",
            "driver": "the NVIDIA driver is for CUDA 12"}  # fmt: skip
    assert found.name == "reference"
    assert said[fails] in found.why
    assert said[fails] in str(refused.value)


def test_grouped_mm_takes_no_more_experts_than_its_block_has_threads(pretend_cuda):
    pretend_cuda((9, 0))
    many = shape()._replace(experts=1024)
    assert backends.resolve("auto", many).name == "cuda+triton"
    with pytest.raises(RuntimeInputError, match="at most 1023 experts, and there are 1024"):
        backends.resolve("cuda+grouped_mm", many)


def test_more_experts_than_the_kernels_take_run_on_the_reference(pretend_cuda):
    pretend_cuda((9, 0))
    many = shape()._replace(experts=4096)
    found = backends.resolve("auto", many)
    assert found.name == "reference"
    assert "at most 2048 experts, and there are 4096" in found.why
    with pytest.raises(RuntimeInputError, match="at most 2048 experts"):
        backends.resolve("cuda+triton", many)


def test_an_old_torch_has_no_grouped_mm(pretend_cuda, monkeypatch):
    pretend_cuda((9, 0))
    monkeypatch.setattr(backends.grouped, "exists", lambda: False)
    assert backends.resolve("auto", shape()).name == "cuda+triton"
    with pytest.raises(RuntimeInputError, match=r"has no torch.nn.functional.grouped_mm"):
        backends.resolve("cuda+grouped_mm", shape())


def test_without_triton_torchs_own_kernel_stays():
    found = choice.choose((9, 0), torch.bfloat16, 8, 64, 2048, 1024, has_triton=False)
    assert found.name == "grouped_mm"


def test_memory_is_counted_before_it_is_taken(monkeypatch):
    needed = MoELayer.bytes(256, 7168, 2048, torch.bfloat16)
    assert needed == 3 * 256 * 7168 * 2048 * 2
    monkeypatch.setattr(weights, "free_bytes", lambda _: needed - 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(RuntimeInputError, match=r"take 22\.5 GB, and cpu has 22\.5 GB free"):
        MoELayer.random(256, 7168, 2048, dtype=torch.bfloat16, device="cpu", seed=0)


def test_free_memory_is_known_here():
    free = weights.free_bytes(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**50
    assert weights.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("sizes", [(0, D, F), (E, 0, F), (E, D, -1)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(RuntimeInputError, match="at least 1"):
        MoELayer.random(*sizes, dtype=torch.float32, device="cpu", seed=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_random_weights_of_another_dtype_are_refused(dtype):
    with pytest.raises(RuntimeInputError, match=f"float16 or float64, got {dtype}$"):
        MoELayer.random(E, D, F, dtype=dtype, device="cpu", seed=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_weights_in_float64_are_taken(backend, dtype):
    layer = make(dtype, backend=backend)
    x, ids, weights = batch(9, dtype)
    assert torch.equal(layer(x, ids, weights.double()), layer(x, ids, weights))
    parts = layer.parts(x, ids, weights.double())
    assert torch.equal(parts["combine"](), layer(x, ids, weights))


def test_inputs_that_do_not_fit_are_refused():
    layer = make()
    x, ids, weights = batch(5)
    for given, said in [
        ((x[:4], ids, weights), r"x must be torch.float32 \[5, 64\], got torch.float32 \[4, 64\]"),
        ((x.double(), ids, weights), "got torch.float64"),
        ((x, ids.long(), weights), "int32"),
        ((x, ids, weights[:, :2]), r"weights must be floating point \[5, 3\]"),
        ((x, ids, ids), "got torch.int32"),
        ((x.to("meta"), ids, weights), "x are on meta, the layer is on cpu"),
    ]:
        with pytest.raises(RuntimeInputError, match=said):
            layer(*given)


@pytest.mark.parametrize(
    ("gate_up", "down", "said"),
    [
        (torch.zeros(2, 6, 4), torch.zeros(2, 4, 4), r"\[2, 6, 4\] and down \[2, 4, 4\]"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 4, 2), r"\[2, 5, 4\]"),
        (torch.zeros(6, 4), torch.zeros(4, 3), r"\[6, 4\]"),
        (torch.zeros(0, 6, 4), torch.zeros(0, 4, 3), r"\[0, 6, 4\]"),
        (torch.zeros(2, 6, 4), torch.zeros(2, 4, 3).double(), "both must be alike"),
        (torch.zeros(2, 6, 4).char(), torch.zeros(2, 4, 3).char(), "quantised"),
        (torch.zeros(2, 6, 4, device="meta"), torch.zeros(2, 4, 3, device="meta"), "meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused(gate_up, down, said):
    with pytest.raises(RuntimeInputError, match=said):
        MoELayer(gate_up, down)


def test_the_reference_layer_is_its_ops():
    layer = make(backend="reference")
    given = batch(12)
    assert torch.equal(layer(*given), reference.moe(*given, layer._gate_up, layer._down))


def test_runs_where_triton_and_cuda_cannot_be_imported():
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "cuda", "duckdb", "streamlit", "plotly"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from moe_lens.runtime import ceilings, timing
from moe_lens.runtime.layer import MoELayer
layer = MoELayer.random(4, 8, 8, dtype=torch.float32, device="cpu", seed=0)
print(layer(torch.randn(2, 8), torch.zeros(2, 1).int(), torch.ones(2, 1)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 8])" in done.stdout
