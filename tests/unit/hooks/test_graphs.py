"""CUDA graphs, played on the CPU: replays without Python are recorded, or reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.fake_cuda import FakeGraph
from support.models import TinyModel
from support.tables import frame
from torch import nn

import moe_lens

IDS = torch.arange(12).reshape(3, 4)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    class Graph(FakeGraph):
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return Graph


class Captured:
    """A model's forward as users capture it: static inputs, warm-up, capture."""

    def __init__(self, model, ids, **given):
        self.ids, self.graph = ids.clone(), torch.cuda.CUDAGraph()
        with torch.no_grad():
            model(self.ids, **given)
            self.graph.capture_begin()
            self.out = model(self.ids, **given)
            self.graph.capture_end()
            self.graph.clear_memory()

    def __call__(self, ids):
        self.ids.copy_(ids)
        self.graph.replay()
        return self.out.clone()


def expected(model, batches, run):
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        for ids in batches:
            with rec.step(tags=["a", "b", "a"]):
                model(ids)
    return frame(run, "routing"), frame(run, "load")


def test_each_replay_is_a_forward(model, run, tmp_path):
    batches = [IDS, IDS + 3, IDS + 9]
    rows, load = expected(model, batches, tmp_path / "eager")
    with moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        captured = Captured(model, IDS)
        for ids in batches:
            with rec.step(tags=["a", "b", "a"]):
                out = captured(ids)
        with torch.no_grad():
            last = model(batches[-1])
    assert torch.equal(out, last)
    mine = frame(run, "routing").query("0 < step < 4")  # the first is the warm-up
    assert len(mine) == len(rows) == 3 * 2 * 12
    assert np.stack(mine.expert_ids).tolist() == np.stack(rows.expert_ids).tolist()
    assert np.stack(mine.weights).tolist() == np.stack(rows.weights).tolist()
    own = frame(run, "load").query("0 < step < 4")
    assert own.routed.tolist() == load.routed.tolist()
    assert own.tag.tolist() == load.tag.tolist()
    steps = frame(run, "steps")
    assert steps.fires_seen.tolist() == [2] * 5
    assert not steps.breaches.any()


def test_replays_of_one_step_are_its_forwards(model, run):
    with moe_lens.record(model, run, tokens=1.0) as rec:
        captured = Captured(model, IDS)
        with rec.step():
            captured(IDS)
            captured(IDS + 1)
            with torch.no_grad():
                model(IDS)
    assert frame(run, "steps").query("step == 1").forward.tolist() == [0, 1, 2]


def test_without_steps_every_replay_is_one(model, run):
    with moe_lens.record(model, run):
        captured = Captured(model, IDS)
        captured(IDS)
        captured(IDS)
    assert frame(run, "steps").step.tolist() == [0, 1, 2]


def test_replays_that_python_did_not_start_are_a_breach_that_counts_them(model, run, graphs):
    with pytest.raises(moe_lens.CaptureBreach, match=r"routed is lost.*\(2\)|2 times.*lost"):
        with moe_lens.record(model, run) as rec:
            captured = Captured(model, IDS)
            with rec.step():
                captured(IDS)
                for _ in range(2):
                    FakeGraph.replay(captured.graph)  # beneath what is watched
                captured(IDS)
            rec.flush()


def test_missed_replays_are_counted_once(model, run):
    with pytest.warns(UserWarning, match="routed is lost"):
        with moe_lens.record(model, run, on_breach="warn") as rec:
            captured = Captured(model, IDS)
            with rec.step():
                captured(IDS)
            FakeGraph.replay(captured.graph)
            for _ in range(2):
                with rec.step():
                    captured(IDS)
    assert frame(run, "steps").breaches.tolist() == [0, 0, 1, 0]


def test_a_graph_captured_before_the_recorder_is_told(model, run):
    captured = Captured(model, IDS)
    with pytest.raises(moe_lens.CaptureBreach, match="CUDA graphs replayed without Python"):
        with moe_lens.record(model, run) as rec, rec.step():
            captured(IDS)


def test_a_graph_outlives_the_recorder(model, run, graphs):
    with moe_lens.record(model, run):
        captured = Captured(model, IDS)
        captured(IDS)
    out = captured(IDS + 1)
    with torch.no_grad():
        assert torch.equal(out, model(IDS + 1))
    assert frame(run, "steps").step.tolist() == [0, 1]
    assert graphs.replay is FakeGraph.replay  # torch's class is as it was


def test_blocks_without_their_root_cannot_be_captured(model, run):
    x = torch.randn(3, 4, 8)
    with pytest.raises(moe_lens.CaptureBreach, match="without their root module"):
        with moe_lens.record(model, run) as rec, rec.step(), torch.no_grad():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            for block in model.blocks:
                block(x)
            graph.capture_end()


def test_routing_that_is_changed_in_place_is_told(run):
    class Spoiled(TinyModel):
        def forward(self, input_ids):
            hook = self.blocks[0].gate.register_forward_hook(lambda m, a, out: kept.append(out[2]))
            out = super().forward(input_ids)
            hook.remove()
            kept.pop().zero_()
            return out

    kept: list[torch.Tensor] = []
    model = Spoiled().eval()
    with pytest.raises(moe_lens.CaptureBreach, match=r"changed .*in place"):
        with moe_lens.record(model, run, on_breach="raise") as rec:
            graph, ids = torch.cuda.CUDAGraph(), IDS.clone()
            graph.capture_begin()
            with torch.no_grad():
                model(ids)
            graph.capture_end()
            with rec.step():
                graph.replay()


def test_the_cache_is_as_long_as_when_the_replay_began(run):
    class Cache:
        def __init__(self):
            self.length = torch.tensor(5)

        def get_seq_length(self):
            return self.length

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TinyModel()

        def forward(self, input_ids, past_key_values):
            past_key_values.length.add_(input_ids.shape[1])
            return self.inner(input_ids)

    torch.manual_seed(0)
    model, cache = Cached().eval(), Cache()
    with moe_lens.record(model, run, tokens=1.0) as rec:
        graph, ids = torch.cuda.CUDAGraph(), torch.tensor([[1], [2]])
        graph.capture_begin()
        with torch.no_grad():
            model(ids, cache)
        graph.capture_end()
        cache.length.fill_(5)  # a CUDA graph does nothing while it is captured
        for _ in range(3):
            with rec.step():
                graph.replay()
    tokens = frame(run, "tokens").sort_values(["step", "token"])
    assert tokens.position.tolist() == [5, 5, 6, 6, 7, 7]
    assert set(frame(run, "steps").phase) == {"decode"}
