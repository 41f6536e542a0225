"""`force_routing` on small hand-written models: what it does, refuses and leaves behind."""

from __future__ import annotations

import pytest
import torch
from support.models import TinyBlock, TinyModel, TinyRouter
from support.steering import TOKENS, bare, random_ids, record
from support.tables import read
from support.traces import segment
from support.truth import spy
from torch import nn

import moe_lens
from moe_lens import SteeringError, UnsupportedRouter
from moe_lens_hooks.adapters.fused_experts import FusedExperts

# -- ids by hand ---------------------------------------------------------------------------------


def test_given_ids_reach_the_experts_and_the_router_weighs_them(model):
    ids = random_ids(2, 10)
    with torch.no_grad(), spy(model) as calls, moe_lens.force_routing(model, ids) as forced:
        model(TOKENS)
        model(TOKENS + 1)  # every forward
    assert len(calls) == 4
    for (_, got, weights), wanted in zip(calls, [*ids, *ids], strict=True):
        assert torch.equal(got, wanted)
        torch.testing.assert_close(weights.sum(-1), torch.ones(10))
    assert (forced.forwards, forced.forced_tokens, forced.own_tokens) == (2, 20, 0)
    assert bare(model)


@pytest.mark.parametrize("form", ["whole", "by row", "numbers", "paths"])
def test_ids_come_in_several_forms(model, form):
    ids = random_ids(2, 10)
    given = {
        "whole": ids,
        "by row": ids.view(2, 2, 5, 2).int(),
        "numbers": {0: ids[0], 1: ids[1]},
        "paths": {"blocks.1": ids[1], "blocks.0": ids[0].view(2, 5, 2)},
    }[form]
    with torch.no_grad(), spy(model) as calls, moe_lens.force_routing(model, given):
        model(TOKENS)
    assert all(torch.equal(got, ids[layer]) for layer, (_, got, _) in enumerate(calls))


def test_a_dict_leaves_other_layers_alone(model):
    ids = random_ids(10)
    with torch.no_grad(), spy(model) as free:
        model(TOKENS)
    with torch.no_grad(), spy(model) as calls, moe_lens.force_routing(model, {1: ids}):
        model(TOKENS)
    assert torch.equal(calls[0][1], free[0][1])
    assert torch.equal(calls[1][1], ids)


def test_minus_one_leaves_a_token_to_its_router(model):
    ids = random_ids(2, 10)
    ids[:, 3:] = -1
    with torch.no_grad(), spy(model) as free:
        model(TOKENS)
    with torch.no_grad(), spy(model) as calls, moe_lens.force_routing(model, ids) as forced:
        model(TOKENS)
    assert torch.equal(calls[0][1][:3], ids[0, :3])
    assert torch.equal(calls[0][1][3:], free[0][1][3:])
    assert torch.equal(calls[0][2][3:], free[0][2][3:])
    assert (forced.forced_tokens, forced.own_tokens) == (3, 7)


def test_weights_by_hand(model):
    ids, weights = random_ids(2, 10), torch.rand(2, 10, 2)
    with torch.no_grad(), spy(model) as calls:
        with moe_lens.force_routing(model, ids, weights=weights):
            model(TOKENS)
    for layer, (_, got, given) in enumerate(calls):
        assert torch.equal(got, ids[layer])
        assert torch.equal(given, weights[layer])


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.zeros(10, 2).long(), ValueError, r"it must be \[L, T, K\]"),
        (torch.zeros(1, 10, 2).long(), ValueError, "1 layers, the model 2"),
        (torch.zeros(2, 10, 2), ValueError, "must be signed integers"),
        (torch.zeros(2, 10, 2).bool(), ValueError, "must be signed integers"),
        ({}, ValueError, "nothing would be forced"),
        ({"blocks.7": torch.zeros(10, 2).long()}, ValueError, "no MoE layer is called 'blocks.7'"),
    ],
)
def test_ids_that_cannot_be_are_refused_at_once(model, ids, error, says):
    with pytest.raises(error, match=says):
        moe_lens.force_routing(model, ids)
    assert bare(model)


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (random_ids(2, 9), SteeringError, "routes 10 tokens.* decisions for 9"),
        (random_ids(2, 10, top_k=3), ValueError, "3 ids per token, but blocks.0 chooses 2"),
        (random_ids(2, 10) + 1, ValueError, "from 1 to 6, but blocks.0 has 6 experts"),
        (random_ids(2, 10) - 2, ValueError, "from -2 to"),
        (random_ids(3, 10), SteeringError, "layer 2, but it did not run"),
        ({5: random_ids(10)}, SteeringError, "layer 5, but it did not run"),
        (random_ids(2, 10).where(random_ids(2, 10) > 0, -1), SteeringError, "a part of them"),
    ],
)
def test_ids_that_do_not_fit_stop_the_forward(model, ids, error, says):
    with torch.no_grad():
        free = model(TOKENS)
        with moe_lens.force_routing(model, ids), pytest.raises(error, match=says):
            model(TOKENS)
        assert bare(model)
        assert torch.equal(model(TOKENS), free)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": "token"}, 'by=\'token\' must be "forward" or "position"'),
        ({"weights": "exact"}, "weights='exact'"),
        ({"layout": "tb"}, "layout='tb'"),
        ({"weights": "recorded"}, "needs a trace"),
        ({"weights": torch.rand(2, 10, 3)}, r"expert_ids \[10, 2\], but weights \[10, 3\]"),
    ],
)
def test_arguments_are_checked(model, options, says):
    with pytest.raises(ValueError, match=says):
        moe_lens.force_routing(model, random_ids(2, 10), **options)


# -- a trace, forward by forward -----------------------------------------------------------------


def test_forwards_are_replayed_in_their_order(model, tmp_path):
    batches = [TOKENS, TOKENS[:1] + 3, TOKENS.T + 1]
    outs = record(model, tmp_path / "run", batches)
    for m in model.modules():
        if isinstance(m, TinyRouter):
            m.weight.data.normal_()  # other routers choose and weigh otherwise
    with (
        torch.no_grad(),
        moe_lens.force_routing(model, tmp_path / "run", weights="recorded") as forced,
    ):
        for _ in range(2):
            for batch, out in zip(batches, outs, strict=True):
                assert torch.equal(model(batch), out)
            with pytest.raises(SteeringError, match="3 forwards, and all of them were replayed"):
                model(TOKENS)
            forced.rewind()
    assert forced.forwards == 6
    with (
        torch.no_grad(),
        moe_lens.force_routing(model, tmp_path / "run", weights="recorded", steps=2),
    ):
        assert torch.equal(model(batches[2]), outs[2])
    with moe_lens.force_routing(model, tmp_path / "run", steps=range(1, 3)):
        with pytest.raises(SteeringError, match=r"routes 10 tokens.* decisions for 5"):
            model(TOKENS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 0.0}, r"no per-token rows \(sampling: none\)"),
        ({"tokens": 0.5}, r"rows of \d of the 10 tokens of step \d"),
        ({"tokens": moe_lens.every(2)}, "rows of 0 of the 10 tokens of step 1, forward 0"),
        ({"weights": "bf16"}, "rounded to bf16"),
    ],
)
def test_a_trace_that_holds_too_little_is_refused(model, tmp_path, options, says):
    record(model, tmp_path / "run", [TOKENS, TOKENS], **options)
    with pytest.raises(SteeringError, match=says):
        moe_lens.force_routing(model, tmp_path / "run", weights="recorded")
    assert bare(model)


def test_rounded_weights_are_taken_when_asked_for(model, tmp_path):
    out = record(model, tmp_path / "run", weights="bf16")[0]
    with (
        torch.no_grad(),
        moe_lens.force_routing(model, tmp_path / "run", weights="recorded", allow_rounded=True),
    ):
        rounded = model(TOKENS)
    assert not torch.equal(rounded, out)
    torch.testing.assert_close(rounded, out, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"blocks": 3}, "has 2 MoE layers, the model 3 .not in the trace: blocks.2"),
        ({"blocks": 1}, "has 2 MoE layers, the model 1"),
        ({"experts": 7}, "blocks.0 has 7 experts, but blocks.0 of .* has 6"),
        ({"top_k": 3}, "3 choices per token"),
    ],
)
def test_another_model_is_refused(model, tmp_path, other, says):
    record(model, tmp_path / "run")
    with pytest.raises(SteeringError, match=says):
        moe_lens.force_routing(TinyModel(**{"experts": 6, **other}), tmp_path / "run")


def test_a_wrapped_model_is_the_same_model(model, tmp_path):
    out = record(model, tmp_path / "run")[0]
    wrapped = nn.Sequential(model)
    for m in model.modules():
        if isinstance(m, TinyRouter):
            m.weight.data.normal_()
    with torch.no_grad(), moe_lens.force_routing(wrapped, tmp_path / "run", weights="recorded"):
        assert torch.equal(wrapped(TOKENS), out)


def test_layers_of_a_wrapped_model_are_found_by_name_not_by_order(tmp_path):
    class Backwards(TinyModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in reversed(self.blocks):
                x = x + block(x)
            return x

    torch.manual_seed(0)
    model = Backwards(experts=6, top_k=2).eval()
    out = record(model, tmp_path / "run")[0]
    wrapped = nn.Sequential(model)
    with torch.no_grad(), moe_lens.force_routing(wrapped, tmp_path / "run"):
        assert torch.equal(wrapped(TOKENS), out)


def test_another_text_is_refused_where_the_text_was_kept(model, tmp_path):
    record(model, tmp_path / "run", token_ids=True)
    with moe_lens.force_routing(model, tmp_path / "run"):
        with pytest.raises(SteeringError, match=r"token 9 is 3, was 9 \(1 of 10 differ"):
            model(TOKENS.clone().masked_fill(TOKENS == 9, 3))


def test_ids_of_a_trace_that_no_expert_has_are_refused(model, tmp_path):
    record(model, tmp_path / "run")
    rows = read(tmp_path / "run", "routing").to_pylist()
    rows[3]["expert_ids"] = [0, 6]
    segment(tmp_path / "run", "routing", rows)
    with pytest.raises(ValueError, match=r"from 0 to 6, but blocks.0 has 6 experts"):
        moe_lens.force_routing(model, tmp_path / "run")


def test_a_path_that_is_no_trace(model, tmp_path):
    with pytest.raises(moe_lens.TraceError, match="does not exist"):
        moe_lens.force_routing(model, tmp_path / "nowhere")
    record(model, tmp_path / "run")
    with pytest.raises(SteeringError, match="no rank 3"):
        moe_lens.force_routing(model, tmp_path / "run", rank=3)
    with pytest.raises(SteeringError, match="steps 7 to 7"):
        moe_lens.force_routing(model, tmp_path / "run", steps=7)
    with pytest.raises(ValueError, match='sequences= is for by="position"'):
        moe_lens.force_routing(model, tmp_path / "run", sequences=[0])
    with moe_lens.force_routing(model, tmp_path / "run") as forced:
        with pytest.raises(SteeringError, match='by="position"'):
            forced.rows([0])
    assert bare(model)


# -- routers -------------------------------------------------------------------------------------


class SortingRouter(TinyRouter):
    """Chooses by a full sort."""

    def forward(self, x_TD):
        logits = x_TD @ self.weight.T
        prob, ids = logits.softmax(-1).sort(-1, descending=True)
        return logits, prob[:, : self.top_k].contiguous(), ids[:, : self.top_k].contiguous()


class StubbornBlock(TinyBlock):
    """Gives its experts other ids than its router chose."""

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, -2)
        _, weights, ids = self.gate(x_TD)
        return self.experts(x_TD, ids.roll(1, 0), weights).view_as(x_BSD)


def test_a_choice_that_cannot_be_forced_inside_is_refused_by_name(model, tmp_path):
    model.blocks[1].gate = SortingRouter(6, 2, 8)
    out = record(model, tmp_path / "run")[0]
    with torch.no_grad():
        with moe_lens.force_routing(model, random_ids(2, 10)):
            with pytest.raises(UnsupportedRouter, match=r"blocks.1.*SortingRouter.*none of torch"):
                model(TOKENS)
        with moe_lens.force_routing(model, tmp_path / "run", weights="recorded"):
            assert torch.equal(model(TOKENS), out)


def test_experts_that_get_something_else_are_noticed(model):
    model.blocks[0] = StubbornBlock(6, 2, 8)
    ids = random_ids(2, 10)
    with moe_lens.force_routing(model, ids), torch.no_grad():
        with pytest.raises(UnsupportedRouter, match=r"blocks.0: .* of 10 tokens went to other"):
            model(TOKENS)
    assert bare(model)


@pytest.mark.parametrize("kind", ["dynamic-k", "expert-choice"])
def test_routers_without_a_choice_per_token_are_refused(model, kind):
    class Other:
        name = "other"

        def layer(self, path, module):
            found = FusedExperts().layer(path, module)
            if found is not None:
                found.info.router = kind
            return found

    with pytest.raises(UnsupportedRouter, match=r"blocks.0 \(TinyBlock\) cannot be forced"):
        moe_lens.force_routing(model, random_ids(2, 10), adapters=[Other()])


def test_compiled_models_are_refused(model):
    with pytest.raises(UnsupportedRouter, match="is compiled"):
        moe_lens.force_routing(torch.compile(model), random_ids(2, 10))
    model.blocks[1].compile()
    with pytest.raises(UnsupportedRouter, match=r"blocks.1 is compiled"):
        moe_lens.force_routing(model, random_ids(2, 10))


def test_a_block_that_runs_on_its_own_is_refused(model):
    with moe_lens.force_routing(model, random_ids(2, 10)):
        with pytest.raises(SteeringError, match="outside a forward of the module"):
            model.blocks[0](torch.randn(2, 5, 8))
    assert bare(model)


# -- gradients -----------------------------------------------------------------------------------


def test_gradients_of_the_router_are_those_of_finite_differences():
    torch.manual_seed(0)
    model = TinyModel(experts=6, top_k=2).double()
    ids = random_ids(2, 10)

    def loss():
        return model(TOKENS).square().sum()

    with moe_lens.force_routing(model, ids):
        loss().backward()
        for block in model.blocks:
            weight = block.gate.weight
            found = torch.zeros_like(weight)
            for i in range(weight.numel()):
                with torch.no_grad():
                    flat = weight.view(-1)
                    at = flat[i].item()
                    flat[i] = at + 1e-6
                    above = loss()
                    flat[i] = at - 1e-6
                    below = loss()
                    flat[i] = at
                    found.view(-1)[i] = (above - below) / 2e-6
            torch.testing.assert_close(weight.grad, found, rtol=1e-5, atol=1e-6)
            assert weight.grad.abs().sum() > 0
