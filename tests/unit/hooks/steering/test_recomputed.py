"""Blocks that gradient checkpointing runs again: each as the forward that it belongs to."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyModel
from support.steering import TOKENS, bare, random_ids, record
from torch.utils.checkpoint import checkpoint

import moe_lens
from moe_lens import SteeringError


class Checkpointed(TinyModel):
    reentrant = False

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            if torch.is_grad_enabled():
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = x + block(x)
        return x


@pytest.fixture(params=[False, True], ids=["not reentrant", "reentrant"])
def trainee(request):
    torch.manual_seed(0)
    model = Checkpointed(experts=6, top_k=2)
    model.reentrant = request.param
    return model


def ids_of(*experts):
    """Every token of both blocks goes to these."""
    return torch.tensor(experts).expand(2, 10, 2)


@pytest.fixture
def two(trainee, tmp_path):
    """The same batch twice, sent to experts 0 and 1, then to 2 and 3."""
    with moe_lens.record(trainee, tmp_path / "run", tokens=1.0), torch.no_grad():
        for ids in (ids_of(0, 1), ids_of(2, 3)):
            with moe_lens.force_routing(trainee, ids):
                trainee(TOKENS)
    return tmp_path / "run"


def touched(model):
    """Experts with a gradient, which is taken away."""
    found = [b.experts.weight.grad.abs().sum((1, 2)).nonzero().flatten() for b in model.blocks]
    model.zero_grad()
    assert torch.equal(*found)
    return found[0].tolist()


def test_a_backward_pass_after_each_forward_finds_its_own(trainee, two):
    with moe_lens.force_routing(trainee, two) as forced:
        for _ in range(2):
            for experts in ([0, 1], [2, 3]):
                trainee(TOKENS).sum().backward()
                assert touched(trainee) == experts
            forced.rewind()
    assert bare(trainee)


@pytest.mark.parametrize("together", [False, True])
def test_what_cannot_be_told_apart_is_refused(trainee, two, together):
    with moe_lens.force_routing(trainee, two):
        losses = [trainee(TOKENS).sum() for _ in range(2)]
        loss = losses[0] + losses[1] if together else losses[0]
        with pytest.raises(SteeringError, match=r"2 forwards gave it, .* different experts"):
            loss.backward()


def test_other_batches_may_wait_in_any_order(trainee, tmp_path):
    batches = [TOKENS, TOKENS + 9, TOKENS]
    ids = [ids_of(0, 1), ids_of(2, 3), ids_of(0, 1)]  # the same batch, sent to the same experts
    with moe_lens.record(trainee, tmp_path / "run", tokens=1.0), torch.no_grad():
        for batch, of_batch in zip(batches, ids, strict=True):
            with moe_lens.force_routing(trainee, of_batch):
                trainee(batch)
    with moe_lens.force_routing(trainee, tmp_path / "run"):
        losses = [trainee(batch).sum() for batch in batches]
        for i, experts in ((1, [2, 3]), (0, [0, 1]), (2, [0, 1])):
            losses[i].backward()
            assert touched(trainee) == experts


def test_weights_that_differ_are_other_decisions(trainee, tmp_path):
    ids = random_ids(2, 10)
    with moe_lens.record(trainee, tmp_path / "run", tokens=1.0, weights="exact"), torch.no_grad():
        for weights in torch.rand(2, 2, 10, 2):
            with moe_lens.force_routing(trainee, ids, weights=weights):
                trainee(TOKENS)
    with moe_lens.force_routing(trainee, tmp_path / "run", weights="recorded"):
        loss = trainee(TOKENS).sum()
        trainee(TOKENS)
        with pytest.raises(SteeringError, match="different experts"):
            loss.backward()


def test_an_input_that_no_forward_had_is_refused(trainee, tmp_path):
    record(trainee, tmp_path / "run")
    loss = trainee(TOKENS).sum()  # before anything was forced
    with moe_lens.force_routing(trainee, tmp_path / "run"):
        with pytest.raises(SteeringError, match="that of none of the last 0 forwards"):
            loss.backward()
