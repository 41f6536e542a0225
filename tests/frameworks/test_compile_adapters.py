"""What adapters may do under torch.compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import TinyBlock
from support.tables import frame
from support.telling import BACKENDS, Telling, Told, assert_recorded
from torch import nn

import moe_lens
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks import MoELayer, Tap
from moe_lens_hooks.adapters.torch_calls import TorchCalls

IDS = torch.arange(12).reshape(3, 4)
LONGER = torch.arange(30).reshape(5, 6)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def telling():
    torch.manual_seed(0)
    return Telling().eval()


class Marking(nn.Module):
    """An MoE whose router notes a capacity that follows from the batch, and states ids anew."""

    def __init__(self, read=None):
        super().__init__()
        self.route, self.bank, self.capacity = nn.Linear(8, 4), TinyBlock().experts, 0

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, 1)
        self.capacity = x_TD.shape[0] * 3
        weights_TK, ids_TK = self.route(x_TD).softmax(-1).topk(2)
        y_TD = self.bank(x_TD, ids_TK, weights_TK)
        ids_TK.zero_()  # after the experts: not what they were given
        return y_TD.view_as(x_BSD)


class MarkingAdapter:
    """Each tap looks at what the one before it saw."""

    name = "marking"

    def layer(self, path, module):
        if not isinstance(module, Marking):
            return None

        def router(seen, args, kwargs, output):
            seen.logits_TE, seen.capacity = output, module.capacity
            seen.router_ids_TK = output.topk(2).indices

        def experts(seen, args, kwargs, output):
            _, ids_TK, seen.weights_TK = args
            seen.expert_ids_TK = torch.where(seen.router_ids_TK == ids_TK, ids_TK, -1)
            seen.kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
            seen.problems["capacity not seen"] = int(not seen.capacity)

        taps = [Tap(module.route, "output", router), Tap(module.bank, "input", experts)]
        info = LayerInfo(-1, path, experts=4, top_k=2, adapter=self.name)
        return MoELayer(module, info, taps, module.route)


@pytest.mark.parametrize("backend", BACKENDS)
def test_taps_may_look_at_what_others_saw_and_at_attributes(run, tmp_path, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 8), Marking(), Marking()).eval()

    def record(model, folder):
        with moe_lens.record(model, folder, tokens=1.0, adapters=[MarkingAdapter()]) as rec:
            for ids in (IDS, LONGER, IDS):
                with torch.no_grad(), rec.step():
                    model(ids)

    record(model, tmp_path / "eager")
    record(torch.compile(model, backend=backend, fullgraph=True), run)
    layers = frame(run, "layers").sort_values(["step", "layer"])
    assert layers.capacity.tolist() == [36, 36, 90, 90, 36, 36]
    eager, fast = frame(tmp_path / "eager", "routing"), frame(run, "routing")
    assert [list(x) for x in fast.expert_ids] == [list(x) for x in eager.expert_ids]
    assert (np.stack(fast.expert_ids) >= 0).all()


def test_what_an_adapter_stumbles_over_is_a_breach_also_when_compiled(telling, run):
    class Stumbling:
        name = "stumbling"

        def layer(self, path, module):
            if not isinstance(module, Told):
                return None

            def read(seen, args, kwargs, output):
                seen.expert_ids_TK = {}["there is no such key"]

            info = LayerInfo(-1, path, experts=4, top_k=2, adapter=self.name)
            return MoELayer(module, info, [Tap(module.gate, "output", read)])

    with pytest.raises(moe_lens.CaptureBreach, match=r"could not read TinyRouter \(KeyError, in"):
        with moe_lens.record(telling, run, adapters=[Stumbling()]) as rec, rec.step():
            torch.compile(telling, backend="eager", fullgraph=True)(IDS)


class Watching:
    """Sees the ids inside the router, by what torch functions it calls."""

    name = "watching"

    def layer(self, path, module):
        if not isinstance(module, Told):
            return None

        def around(seen):
            def see(name, args, result):
                if name == "topk":
                    seen.router_ids_TK = result.indices

            return TorchCalls(see)

        def experts(seen, args, kwargs, output):
            _, seen.expert_ids_TK, seen.weights_TK = args

        taps = [
            Tap(module.gate, "around", around=around),
            Tap(module.experts, "input", experts),
        ]
        info = LayerInfo(-1, path, experts=4, top_k=2, adapter=self.name)
        return MoELayer(module, info, taps)


def test_watching_inside_a_module_breaks_the_graph_and_says_so(telling, run, tmp_path):
    with torch.no_grad():
        with moe_lens.record(
            telling, run, tokens=1.0, weights="exact", adapters=[Watching()]
        ) as rec:
            fast = torch.compile(telling, backend="aot_eager")
            said = []
            for ids in (IDS, LONGER):
                with rec.step():
                    said.append(fast(ids)[1])
        assert_recorded(run, said)
        torch._dynamo.reset()
        with moe_lens.record(telling, tmp_path / "full", adapters=[Watching()]) as rec:
            whole = torch.compile(telling, backend="aot_eager", fullgraph=True)
            with pytest.raises(Exception, match="moe_lens watches what runs inside this module"):
                whole(IDS)
            telling(IDS)  # and the recorder goes on
