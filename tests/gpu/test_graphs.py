"""CUDA graphs: each replay is recorded; torch.compile, with graphs of its own, too."""

from __future__ import annotations

import pytest
import torch
from support.tables import frame
from support.telling import Telling, assert_recorded, kept

import moe_lens

IDS = torch.arange(24).reshape(3, 8)


@pytest.fixture
def telling():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Telling().eval().cuda()


class Captured:
    """A forward as users capture it: static inputs, warm-up on a side stream, capture."""

    def __init__(self, model):
        self.ids = IDS.cuda()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(3):
                model(self.ids)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.out, self.said = model(self.ids)

    def __call__(self, ids):
        self.ids.copy_(ids)
        self.graph.replay()
        return kept(self.said)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_replay_is_a_forward(telling, run, compiled):
    with moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        model = torch.compile(telling, fullgraph=True) if compiled else telling
        captured, said = Captured(model), []
        for shift in range(5):
            with rec.step():
                said.append(captured(IDS.cuda() + shift))
    assert_recorded(run, said, first=3)  # the warm-up
    assert frame(run, "steps").step.tolist() == list(range(3 + 5))


def test_replays_do_not_wait(telling, run, no_waiting):
    with moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        captured, said = Captured(telling), []
        ids = IDS.cuda()
        for _ in range(4):
            no_waiting(True)
            with rec.step():
                said.append(captured(ids))
            no_waiting(False)
    assert_recorded(run, said, first=3)


def test_replays_that_python_does_not_start_are_counted(telling, run):
    with pytest.warns(UserWarning, match="routed is lost"):
        with moe_lens.record(telling, run, on_breach="warn") as rec:
            captured = Captured(telling)
            with rec.step():
                captured.graph.replay()
            torch._C._CUDAGraph.replay(captured.graph)
            with rec.step():
                captured.graph.replay()
            rec.flush()
            with rec.step():
                captured.graph.replay()
    assert frame(run, "steps").breaches.tolist() == [0, 0, 0, 0, 1, 0]


def test_recording_changes_no_output_of_a_replay(telling, run):
    with torch.no_grad():
        bare = telling(IDS.cuda())[0]
    with moe_lens.record(telling, run) as rec:
        captured = Captured(telling)
        with rec.step():
            captured(IDS.cuda())
        assert torch.equal(bare, captured.out)
    captured(IDS.cuda())  # the graph outlives the recorder
    assert torch.equal(bare, captured.out)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_is_recorded(telling, run, mode):
    said = []
    with torch.no_grad(), moe_lens.record(telling, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(telling, mode=mode, fullgraph=True)
        for shift in range(6):  # reduce-overhead: warm-up, capture, and then replays
            torch.compiler.cudagraph_mark_step_begin()
            with rec.step():
                said.append(kept(fast(IDS.cuda() + shift)[1]))
    assert_recorded(run, said)


def test_training_under_compile_counts_once(run):
    torch.manual_seed(0)
    model, said = Telling(checkpointed=True).cuda(), []
    with moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        fast = torch.compile(model, fullgraph=True)
        for _ in range(3):
            with rec.step():
                x, told = fast(IDS.cuda())
                said.append(kept(told))
                x.square().sum().backward()
    assert_recorded(run, said)
