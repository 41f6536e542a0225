"""Interventions that cannot be: models, losses, arguments, memory; nothing is left behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.steering import bare, of_output
from torch import nn

import moe_lens

TOKENS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: of_output(m, b).mean(), r"has shape \[\]: not one a token. Give loss=f"),
        (lambda m, b: of_output(m, b).mean(1), r"3 x 4 tokens has shape \[3\]: not one a token"),
        (lambda m, b: float(of_output(m, b).sum()), "has float: not one a token"),
        (lambda m, b: of_output(m, b) + of_output(m, b), "ran the model 2 times"),
    ],
)
def test_a_loss_that_is_not_per_token_is_refused(model, loss, message):
    with moe_lens.intervene(model, loss=loss) as iv:
        with pytest.raises(moe_lens.SteeringError, match=message):
            iv.measure(TOKENS)


def test_a_model_without_logits_needs_a_loss(model):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return {"hidden": self.inner(x)}

    with moe_lens.intervene(Hidden()) as iv:
        with pytest.raises(moe_lens.SteeringError, match="no loss per token: no logits"):
            iv.measure(TOKENS)


def test_dropout_is_refused(model):
    model.blocks[0].drop = nn.Dropout(0.1).eval()
    with moe_lens.intervene(model, loss=of_output) as iv:
        iv.measure(TOKENS)  # in eval mode it draws nothing
        model.train()
        with pytest.raises(moe_lens.SteeringError, match=r"blocks.0.drop is training with p=0.1"):
            iv.measure(TOKENS)
    with pytest.raises(moe_lens.SteeringError, match=r"call model.eval\(\)"):
        moe_lens.intervene(model, loss=of_output)


def test_a_model_that_draws_fails_the_self_test(model):
    model.embed.register_forward_hook(lambda m, a, out: out + torch.rand_like(out) * 1e-6)
    with moe_lens.intervene(model, loss=of_output) as iv:
        with pytest.raises(moe_lens.UnsupportedRouter, match=r"bit for bit.*Does it draw"):
            iv.measure(TOKENS)


def test_a_router_that_cannot_be_changed_is_refused_by_name(model):
    def sorted_choice(x_TD, gate=model.blocks[0].gate):
        logits = x_TD @ gate.weight.T
        prob, ids = logits.softmax(-1).sort(-1, descending=True)
        return logits, prob[:, :2] / prob[:, :2].sum(-1, keepdim=True), ids[:, :2]

    model.blocks[0].gate.forward = sorted_choice
    with moe_lens.intervene(model, loss=of_output) as iv:
        base = iv.measure(TOKENS)
        with pytest.raises(moe_lens.UnsupportedRouter, match=r"layer 0 \(blocks.0, .*cannot be"):
            iv.runner_up(0)(base)
        assert iv.runner_up(1)(base).affected_N.all()
        assert iv.duplicate(0, 1, over=2)(base).affected_N.any()  # of what experts are given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda iv: iv.knock_out(2, 0), "no layer 2: the model has 2 MoE layers"),
        (lambda iv: iv.knock_out(0, 6), "layer 0 has experts 0 to 5, not 6"),
        (lambda iv: iv.duplicate(0, 1, over=-1), "experts 0 to 5, not -1"),
        (lambda iv: iv.top_k(0, 7), "6 experts: its top-k cannot be 7"),
        (lambda iv: iv.knock_out(0, 0, 1, 2, 3, 4), "left with 1 experts .* needs 2"),
        (lambda iv: iv.runner_up(0) + iv.top_k(0, 1), "layer 0 has two changes at once"),
        (lambda iv: iv.force(0, torch.zeros(3, 4, 1).long()), r"chooses \[3, 4, 2\] of 6"),
        (lambda iv: iv.force(0, torch.tensor([1, 9]).expand(3, 4, 2)), "up to 9"),
    ],
)
def test_what_does_not_fit_is_refused(iv, change, message):
    base = iv.measure(TOKENS)
    with pytest.raises(moe_lens.SteeringError, match=message):
        change(iv)(base)


def test_arguments_that_cannot_be_are_refused(iv, model):
    with pytest.raises(ValueError, match="needs an expert"):
        iv.knock_out(0)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        iv.top_k(0, 0)
    with pytest.raises(ValueError, match="K different experts, or -1"):
        iv.force(0, torch.zeros(3, 4, 2).long())
    with pytest.raises(ValueError, match=r"integers \[B, S, K\]"):
        iv.force(0, torch.zeros(12, 2).long())
    with pytest.raises(ValueError, match="tokens_at_once=0"):
        moe_lens.intervene(model, tokens_at_once=0)
    with pytest.raises(moe_lens.SteeringError, match="3 sequences, but 2 tags"):
        iv.measure({"input_ids": TOKENS, "tags": ["a", "b"]})
    with pytest.raises(moe_lens.SteeringError, match="tags='abc': give a list"):
        iv.measure({"input_ids": TOKENS, "tags": "abc"})
    with pytest.raises(moe_lens.SteeringError, match=r"the batch is empty: \[0, 4\]"):
        iv.measure(TOKENS[:0])
    with pytest.raises(moe_lens.SteeringError, match="got list"):
        iv.measure([1, 2])
    with pytest.raises(moe_lens.SteeringError, match="no tensor"):
        iv.measure({"tags": []})
    with pytest.raises(moe_lens.NoMoELayers):
        moe_lens.intervene(nn.Linear(2, 2))


def test_a_wrong_first_call_says_the_right_one(iv, model):
    base = iv.measure(TOKENS)
    with pytest.raises(TypeError, match=r"got Tensor: base = iv.measure\(batch\), then"):
        iv.knock_out(0, 3)(TOKENS)
    with pytest.raises(TypeError, match=r"got \[1, 2\]: of a list, knock_out\(layer, \*experts\)"):
        iv.knock_out(0, [1, 2])
    for wrong, message in (
        (lambda: iv.knock_out(0, "a"), "expert='a'"),
        (lambda: iv.force_in(0.0, 1), "layer=0.0"),
        (lambda: iv.top_k(0, 1.5), "k=1.5"),
        (lambda: iv.duplicate(0, 1, over=None), "over=None"),
    ):
        with pytest.raises(TypeError, match=f"{message} must be a whole number"):
            wrong()
    numpys = iv.knock_out(np.int64(0), np.int64(3), torch.tensor(1))(base)
    np.testing.assert_array_equal(numpys.loss_N, iv.knock_out(0, 3, 1)(base).loss_N)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_batch_larger_than_memory_names_a_smaller_one(model, error, calls):
    """In any of the three forwards of the self-test, and in a changed one."""
    left = [calls]

    def inside(m, args):
        left[0] -= 1
        if left[0] < 0 and len(args[0]) > 4:
            raise error

    handle = model.blocks[1].experts.register_forward_pre_hook(inside)

    def ask(tokens_at_once):
        left[0] = calls
        with moe_lens.intervene(model, loss=of_output, tokens_at_once=tokens_at_once) as iv:
            return iv.top_k(0, 1)(iv.measure(TOKENS))

    with pytest.raises(moe_lens.SteeringError, match=r"3 x 4 tokens .* tokens_at_once=4 \(") as e:
        ask(12)
    assert e.value.__cause__ is error
    assert len(ask(4).loss_N) == 12
    handle.remove()
    assert bare(model)


def test_one_sequence_larger_than_memory_can_only_be_shorter(model):
    def loss(m, batch):
        raise torch.OutOfMemoryError

    with moe_lens.intervene(model, loss=loss, tokens_at_once=4) as iv:
        with pytest.raises(moe_lens.SteeringError, match=r"1 x 4 tokens .* give shorter ones"):
            iv.measure(TOKENS)


def test_an_error_in_a_forward_leaves_the_model_as_it_was(model):
    """Weights, modes, the random state, hooks and torch's functions; also under Ctrl-C."""
    for error in (KeyError("x"), KeyboardInterrupt()):
        fails = [False]

        def inside(m, args, fails=fails, error=error):
            if fails[0]:
                raise error

        handle = model.blocks[1].experts.register_forward_pre_hook(inside)
        model.blocks[0].train()
        before = copy.deepcopy(model.state_dict())
        modes = [m.training for m in model.modules()]
        state = torch.get_rng_state()
        with moe_lens.intervene(model, loss=of_output) as iv:
            base = iv.measure(TOKENS)
            iv.random(0)(base)
            fails[0] = True
            for change in (iv.knock_out(0, 1), iv.duplicate(1, 0, over=2), iv.top_k(0, 1)):
                with pytest.raises(type(error)):
                    change(base)
        handle.remove()
        assert bare(model)
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name])
        assert torch.is_grad_enabled()
