"""Routing that changes in place inside a block: before the experts use it, and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.inline_models import GLU, D, E, K, build
from support.inside import captured
from torch import nn

import moe_lens
from moe_lens.errors import CaptureBreach


class Changing(nn.Module):
    """Halves its weights before the experts use them, and changes what is asked for afterwards."""

    def __init__(self):
        super().__init__()
        self.top_k, self.after = K, ""
        self.gate = nn.Linear(D, E, bias=False)
        self.make()

    def make(self):
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def mix(self, x, weights, ids):
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t):
                out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, D)
        weights, ids = self.gate(x).softmax(-1).topk(K)
        weights.view(-1).mul_(0.5)
        weights[:, 0] = weights[:, 0] * 0.5
        self.used = weights.clone()
        out = self.mix(x, weights, ids)
        if self.after == "weights":
            weights.mul_(10)
        if self.after == "items":
            weights[:] = 0.0
        if self.after == "ids":
            ids[:] = 0
        return out.view(shape)


class Stacked(Changing):
    """Experts are parameters of the block itself: no module is called."""

    def make(self):
        self.w = nn.Parameter(torch.randn(E, D, D) / D)

    def mix(self, x, weights, ids):
        return torch.einsum("td,tkdf,tk->tf", x, self.w[ids], weights)


KINDS = {"members": Changing, "stacks": Stacked}
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


@pytest.fixture(params=KINDS)
def model(request):
    return build(KINDS[request.param], blocks=1)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", MODES)
def test_what_changes_before_its_use_is_recorded_as_it_was_used(model, ids, mode, tmp_path):
    run = tmp_path / "run"
    with MODES[mode](), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        for _ in range(2):
            with rec.step():
                model(ids)
    for step in range(2):
        _, weights = captured(run, 0, step)
        np.testing.assert_array_equal(weights, model.blocks[0].used.detach())


@pytest.mark.parametrize("after", ["weights", "items", "ids"])
def test_what_changes_after_its_use_is_a_breach(model, ids, after, tmp_path):
    with pytest.raises(CaptureBreach, match=r"changed in place after it was used \(24\)"):
        with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec:
            for step in range(2):
                model.blocks[0].after = after if step else ""
                with rec.step():
                    model(ids)


def test_so_it_is_on_the_forward_that_proves_the_block(model, ids, tmp_path):
    model.blocks[0].after = "weights"
    with pytest.raises(CaptureBreach, match=r"changed in place after it was used \(24\)"):
        with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec, rec.step():
            model(ids)


@pytest.mark.parametrize("after", ["weights", "items", "ids"])
def test_in_inference_mode_it_was_copied(model, ids, after, tmp_path):
    with torch.inference_mode():
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact") as rec:
            for step in range(3):
                model.blocks[0].after = after if step else ""
                with rec.step():
                    model(ids)
    want = captured(tmp_path / "run", 0, 0)[0]
    for step in range(3):
        got, weights = captured(tmp_path / "run", 0, step)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(weights, model.blocks[0].used)
