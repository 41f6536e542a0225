"""On a GPU: every kernel against the plain torch reference; in graphs, on streams, in threads."""

from __future__ import annotations

import threading

import pytest
import torch
from support.routings import Routing, routing

from moe_lens.runtime import reference
from moe_lens.runtime.cuda import compiler, kernels, launch
from moe_lens.runtime.plan import Placed, Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}
SIZES = [  # tokens, experts, top_k, skew
    (0, 8, 2, 0.0),
    (1, 8, 2, 0.0),
    (64, 64, 8, 0.0),
    (64, 128, 8, 1.0),
    (512, 64, 8, 0.5),  # 4096 slots, the most that one block takes
    (513, 64, 8, 0.5),
    (64, 1024, 64, 0.0),
    (4096, 64, 8, 0.0),
    (4096, 128, 8, 1.0),
    (4096, 8, 2, 50.0),
    (3000, 2048, 10, 0.3),
    (9001, 1, 1, 0.0),
    (50_000, 256, 8, 1.0),
]


def on_gpu(of: Routing) -> Routing:
    return Routing(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in vars(of).values()))


def tensors(of: Plan | Placed) -> list[torch.Tensor]:
    return list(vars(of).values())


def assert_same(got: Plan | Placed, expected: Plan | Placed) -> None:
    for name, x in vars(got).items():
        assert x.dtype == torch.int32
        assert torch.equal(x.cpu(), getattr(expected, name).cpu()), name


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), **CLOSE[got.dtype])


@pytest.mark.parametrize(("tokens", "experts", "top_k", "skew"), SIZES)
@pytest.mark.parametrize("none", [0.0, 0.2])
def test_plan(tokens, experts, top_k, skew, none):
    of = routing(0, tokens, experts, top_k, none=none, skew=skew)
    expected = reference.plan(of.ids_TK, experts)
    for _ in range(5):
        assert_same(kernels.plan(of.ids_TK.cuda(), experts), expected)


@pytest.mark.parametrize("by", ["position", "prob"])
@pytest.mark.parametrize("runners_up", [0, 1, 4])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "skew"), [size for size in SIZES if size[0] < 9000]
)
def test_capacity(by, runners_up, tokens, experts, top_k, skew):
    runners_up = min(runners_up, experts - top_k)
    of = routing(1, tokens, experts, top_k, runners_up=runners_up, skew=skew, levels=9)
    options = {"next_ids_TM": of.next_ids_TM}
    if by == "prob":
        options |= {"priority_TK": of.priority_TK, "next_priority_TM": of.next_priority_TM}
    there = {name: x.cuda() for name, x in options.items()}
    mean = tokens * top_k // experts
    rooms = torch.randint(0, 2 * mean + 2, (experts,), dtype=torch.int32)
    for room in (0, mean, mean + mean // 4 + 1, rooms):
        room_there = room.cuda() if isinstance(room, torch.Tensor) else room
        expected = reference.capacity(of.ids_TK, experts, room, by=by, **options)
        for _ in range(2):
            got = kernels.capacity(of.ids_TK.cuda(), experts, room_there, by=by, **there)
            assert_same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 6, 512, 2048, 2880, 7168, 7169])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (300, 64, 8), (333, 16, 3)])
def test_rows(dtype, width, tokens, experts, top_k):
    of = on_gpu(routing(2, tokens, experts, top_k))
    where = kernels.plan(of.ids_TK, experts)
    running = int(where.ends_E[-1])
    x_TD = torch.randn(tokens, width, device="cuda").to(dtype)
    x_SD = kernels.permute(x_TD, where)
    assert torch.equal(x_SD[:running], reference.permute(x_TD, where)[:running])

    y_SD = torch.randn(tokens * top_k, width, device="cuda").to(dtype)
    y_SD[running:] = torch.nan
    weights_TK = torch.rand(tokens, top_k, device="cuda")
    weights_TK[of.ids_TK < 0] = torch.nan
    for weights in (weights_TK, weights_TK.bfloat16(), weights_TK.half()):
        y_TD = kernels.combine(y_SD, where, weights)
        assert not y_TD.isnan().any()
        close(y_TD, reference.combine(y_SD, where, weights))
        assert torch.equal(y_TD, kernels.combine(y_SD, where, weights))

    gate_up_S2F = 4 * torch.randn(tokens * top_k, 2 * width, device="cuda").to(dtype)
    gate_up_S2F[running:] = torch.nan
    h_SF = kernels.swiglu(gate_up_S2F, where.ends_E)[:running]
    close(h_SF, reference.swiglu(gate_up_S2F)[:running])
    assert torch.equal(h_SF, kernels.swiglu(gate_up_S2F)[:running])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_and_special_values(dtype):
    every = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16).view(256, 256)
    x = (every.view(torch.bfloat16) if dtype != torch.float16 else every.view(dtype)).to(dtype)
    where = kernels.plan(torch.zeros(256, 1, dtype=torch.int32, device="cuda"), 1)
    one = torch.ones(256, 1, device="cuda")
    for width in (256, 255):  # in words, one by one
        part = x[:, :width].contiguous()
        through = kernels.combine(kernels.permute(part, where), where, one)
        torch.testing.assert_close(through, part, rtol=0, atol=0, equal_nan=True)
        scaled = kernels.combine(part, where, one / 3)
        exact = (part.float() * (one / 3)).to(dtype)
        torch.testing.assert_close(scaled, exact, rtol=0, atol=0, equal_nan=True)
        h = kernels.swiglu(torch.cat([part, torch.ones_like(part)], dim=1))
        expected = torch.nn.functional.silu(part.float()).to(dtype)
        torch.testing.assert_close(h, expected, **CLOSE[dtype], equal_nan=True)


class Whole:
    """All ops one after the other, into tensors that a graph keeps."""

    def __init__(self, tokens: int, experts: int, top_k: int, width: int) -> None:
        self.experts, self.sizes = experts, (tokens, experts, top_k)
        self.of = on_gpu(self.routing(0))
        self.x_TD = torch.randn(tokens, width, device="cuda").bfloat16()
        self.weights_TK = torch.rand(tokens, top_k, device="cuda")
        self.room = 2 * tokens * top_k // experts

    def routing(self, seed: int) -> Routing:
        return routing(seed, *self.sizes, runners_up=2, skew=1.0)

    def __call__(self) -> list[torch.Tensor]:
        of = self.of
        placed = kernels.capacity(
            of.ids_TK,
            self.experts,
            self.room,
            by="prob",
            priority_TK=of.priority_TK,
            next_ids_TM=of.next_ids_TM,
            next_priority_TM=of.next_priority_TM,
        )
        where = kernels.plan(placed.expert_ids_TK, self.experts)
        h_SF = kernels.swiglu(kernels.permute(self.x_TD, where), where.ends_E)
        y_TD = kernels.combine(h_SF, where, self.weights_TK)
        return [*tensors(placed), *tensors(where), y_TD]

    def load(self, seed: int) -> None:
        new = self.routing(seed)
        for name, x in vars(self.of).items():
            if isinstance(x, torch.Tensor):
                x.copy_(getattr(new, name))
        self.x_TD.normal_()


@pytest.mark.parametrize("tokens", [64, 1024])
def test_a_graph_replays_other_routing(tokens):
    whole = Whole(tokens, 64, 8, 256)
    whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = whole()
    for seed in range(1, 4):
        whole.load(seed)
        graph.replay()
        first = [x.clone() for x in kept]
        graph.replay()
        for x, again, eager in zip(first, kept, whole(), strict=True):
            assert torch.equal(x, again)
            assert torch.equal(x, eager)


def test_nothing_waits_for_the_device(no_waiting):
    whole = Whole(600, 64, 8, 256)
    whole()
    kernels.flush_l2(torch.device("cuda"))
    no_waiting(True)
    whole()
    kernels.flush_l2(torch.device("cuda"))
    no_waiting(False)


def test_streams_and_threads():
    whole = Whole(600, 64, 8, 256)
    expected, found = whole(), []
    torch.cuda.synchronize()

    def elsewhere() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(whole())

    elsewhere()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 2
    for got in found:
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_more_than_2_31_numbers():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    tokens, top_k, width = 36_000, 8, 8192
    of = on_gpu(routing(0, tokens, 16, top_k, none=0.0))
    where = kernels.plan(of.ids_TK, 16)
    x_TD = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    x_SD = kernels.permute(x_TD, where)
    assert x_SD.numel() > 2**31
    for begin in range(0, len(x_SD), 30_000):
        part = slice(begin, begin + 30_000)
        assert torch.equal(x_SD[part], x_TD[where.slot_S[part].long() // top_k])
    halves = torch.full((tokens, top_k), 0.125, device="cuda")
    assert torch.equal(kernels.combine(x_SD, where, halves), x_TD)
    h_SF = kernels.swiglu(x_SD, where.ends_E)
    close(h_SF[-1000:], reference.swiglu(x_SD[-1000:]))


def test_flush_reads_more_than_the_cache_and_can_be_captured():
    device = torch.device("cuda", torch.cuda.current_device())
    kernels.flush_l2(device)
    buffer = kernels._flushed[device]
    assert buffer.numel() >= 2 * torch.cuda.get_device_properties(device).L2_cache_size
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.flush_l2(device)
    graph.replay()
    torch.cuda.synchronize()
    assert not buffer.any()


def test_every_kernel_is_loaded_at_once():
    index = torch.cuda.current_device()
    assert set(launch.load(index)) == set(compiler.kernel_names())
