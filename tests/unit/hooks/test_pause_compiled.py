"""Recording that is stopped and started under torch.compile, and with CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.fake_cuda import FakeGraph
from support.models import TinyModel
from support.tables import frame
from support.truth import spy
from torch import nn

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import open_run
from moe_lens_hooks import MoELayer, Tap
from moe_lens_hooks.pausing import NOT_RECORDED

IDS = torch.arange(12).reshape(3, 4)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def traced(run):
    """{(step, forward): [ids [T, K] of each layer]} of a trace with every row."""
    rows = frame(run, "routing").sort_values(["step", "forward", "layer", "token"])
    out = {}
    for (step, forward, _), part in rows.groupby(["step", "forward", "layer"]):
        out.setdefault((step, forward), []).append(np.stack(part.expert_ids).tolist())
    return out


def not_recorded(run):
    return open_run(run).metas[0].warnings.get(NOT_RECORDED, 0)


def ran(calls):
    """What the spy saw since it was last asked."""
    seen = [ids.tolist() for _, ids, _ in calls]
    calls.clear()
    return seen


class Counting:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@pytest.mark.parametrize("paused", [False, True])
def test_a_compiled_model_is_not_compiled_again(model, run, backend, paused):
    with moe_lens.record(model, run, tokens=1.0, paused=paused) as rec:
        fast = torch.compile(model, backend=backend, fullgraph=True)
        truth, graphs = {}, []
        for step, on in enumerate([not paused, False, True, True, False, True]):
            (rec.start if on else rec.stop)()
            fast((IDS + step) % 32)
            graphs.append(backend.graphs)
            if on:
                with spy(other := twin(model)) as calls:
                    other((IDS + step) % 32)
                    truth[step, 0] = ran(calls)
    assert traced(run) == truth
    assert set(graphs) == {graphs[0]}
    assert not_recorded(run) == 6 - len(truth)


def twin(model):
    other = TinyModel().eval()
    other.load_state_dict(model.state_dict())
    return other


class Gate(nn.Linear):
    """Logits only: the layer's taps look at what others saw."""


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 8) / 3)

    def forward(self, x, choice, weights):
        return torch.einsum("td,tkdf,tk->tf", x, self.weight[choice], weights)


class Broken(nn.Module):
    """Its block is compiled in two pieces."""

    def __init__(self):
        super().__init__()
        self.route, self.bank = Gate(8, 6), Bank()

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, choice = self.route(flat).softmax(-1).topk(2)
        torch._dynamo.graph_break()
        return self.bank(flat, choice, weights).view_as(x)


class BrokenAdapter:
    name = "broken"

    def layer(self, path, module):
        if not isinstance(module, Broken):
            return None

        def router(seen, args, kwargs, output):
            seen.logits_TE = output

        def experts(seen, args, kwargs, output):
            _, seen.expert_ids_TK, seen.weights_TK = args

        info = LayerInfo(layer=-1, path=path, experts=6, top_k=2, adapter=self.name)
        taps = [Tap(module.route, "output", router), Tap(module.bank, "input", experts)]
        return MoELayer(module, info, taps, module.route)


@pytest.mark.parametrize("paused", [False, True])
def test_a_block_that_is_compiled_in_pieces(run, backend, paused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 8), Broken(), Broken()).eval()
    adapters = [BrokenAdapter()]
    plain = run.with_name("plain")
    with moe_lens.record(model, plain, tokens=1.0, adapters=adapters):
        model(IDS)
    with moe_lens.record(model, run, tokens=1.0, adapters=adapters, paused=paused) as rec:
        fast = torch.compile(model, backend=backend)
        for on in [not paused, False, True, False, True]:
            (rec.start if on else rec.stop)()
            fast(IDS)
        graphs = backend.graphs
        for on in (False, True):
            (rec.start if on else rec.stop)()
            fast(IDS)
        assert backend.graphs == graphs  # once for each state, at the most
    expected = traced(plain)[0, 0]
    steps = [s for s, on in enumerate([not paused, False, True, False, True, False, True]) if on]
    assert traced(run) == {(step, 0): expected for step in steps}
    entropy = frame(run, "routing").entropy
    assert entropy.notna().all()


class Captured:
    """A model's forward in a CUDA graph, as users capture it."""

    def __init__(self, model):
        self.ids, self.graph = IDS.clone(), torch.cuda.CUDAGraph()
        model(self.ids)
        self.graph.capture_begin()
        self.out = model(self.ids)
        self.graph.capture_end()
        self.graph.clear_memory()

    def __call__(self, ids):
        self.ids.copy_(ids)
        self.graph.replay()


@pytest.mark.parametrize("paused", [False, True])
def test_replays_of_a_cuda_graph(model, run, monkeypatch, paused):
    """Also where the graph was captured while recording was paused."""

    class Graph(FakeGraph):
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    truth = {}
    with moe_lens.record(model, run, tokens=1.0, paused=paused) as rec:
        captured = Captured(model)  # its warm-up is step 0
        for step, on in enumerate([False, True, True, False, True], 1):
            (rec.start if on else rec.stop)()
            captured((IDS + step) % 32)
            if on:
                with spy(other := twin(model)) as calls:
                    other((IDS + step) % 32)
                    truth[step, 0] = ran(calls)
    found = traced(run)
    assert {k: v for k, v in found.items() if k[0]} == truth
    assert ((0, 0) in found) is not paused
    assert not_recorded(run) == 2 + paused
    assert not frame(run, "steps").breaches.any()


def test_a_capture_without_its_root_is_told_while_paused_too(model, run, monkeypatch):
    class Graph(FakeGraph):
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(moe_lens.CaptureBreach, match="without their root module"):
        with moe_lens.record(model, run, paused=True) as rec, rec.step():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            for block in model.blocks:
                block(torch.randn(3, 4, 8))
            graph.capture_end()
