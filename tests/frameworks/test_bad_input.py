"""What no recording may get wrong: bad routers, edited models, foreign hooks, false friends.

Each must either be recorded as it ran, or be refused by name; no row may be made up.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.inline_models import (
    GLU,
    D,
    E,
    GroupedExperts,
    K,
    Model,
    SoftmaxTopk,
    Top1,
    TutorialMoE,
    build,
)
from support.models import TinyModel
from support.small import IDS, ids_of, refused, small
from support.tables import frame
from torch import nn

import moe_lens
from moe_lens.trace.reader import open_run

# ---- ids out of range ----------------------------------------------------------------------------


class Holes(TutorialMoE):
    """Marks tokens that no expert takes with the id -1 (or, worse, E)."""

    hole = None

    def forward(self, x):
        gates, ids = self.router(x)
        if self.hole is not None:
            ids = torch.where(gates.amax(-1, keepdim=True) < 0.6, self.hole, ids)
        out, flat, flat_gates = torch.zeros_like(x), x.view(-1, D), gates.view(-1, E)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1).view(-1)
            if rows.any():
                out.view(-1, D)[rows] += expert(flat[rows]) * flat_gates[rows, e].unsqueeze(1)
        return out


@pytest.mark.parametrize("hole", [-1, E, 1000])
def test_ids_out_of_range_are_refused_at_first_and_a_breach_later(hole, tmp_path):
    model = small(Holes)
    model.blocks[0].hole = hole
    refused(model, tmp_path / "first", "no tensor of ids in it has such counts")
    model.blocks[0].hole = None
    with torch.no_grad(), moe_lens.record(model, tmp_path / "later", tokens=1.0) as rec:
        with rec.step():
            model(IDS)
        model.blocks[0].hole = hole
        with pytest.raises(moe_lens.MoeLensError, match=r"no tensor of ids|out of range"):
            with rec.step():
                model(IDS)
            rec.flush()
    load = frame(tmp_path / "later", "load")
    assert load.expert.between(0, E - 1).all()


def test_ids_out_of_range_of_fused_experts_are_a_breach(tmp_path):
    model = TinyModel().eval()
    shift = 0
    model.blocks[0].gate.register_forward_hook(lambda m, a, out: (*out[:2], out[2] + shift))
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec:
        with rec.step():
            model(IDS % 32)
        for shift in (-1, 4):  # noqa: B007 - the hook reads it
            with pytest.raises(moe_lens.CaptureBreach, match="layer 0: expert ids out of range"):
                with rec.step():
                    model(IDS % 32)
                rec.flush()


# ---- k that changes ------------------------------------------------------------------------------


def test_k_that_changes_between_steps_is_a_breach(tmp_path):
    model, run = build("softmax_topk", blocks=1), tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        with rec.step():
            model(IDS)
        model.blocks[0].top_k = 3
        with pytest.raises(moe_lens.CaptureBreach, match="3 choices per token"), rec.step():
            model(IDS)
        model.blocks[0].top_k = 2
        with rec.step():
            model(IDS)
    assert sorted(set(frame(run, "routing").step)) == [0, 2]


# ---- other kinds of routing ----------------------------------------------------------------------


class ExpertChoice(nn.Module):
    """Each expert takes the tokens that score best with it."""

    capacity = 8

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def forward(self, x):
        flat = x.view(-1, D)
        scores = self.gate(flat).softmax(-1)
        weights, tokens = scores.t().topk(self.capacity, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, tokens[e], expert(flat[tokens[e]]) * weights[e, :, None])
        return out.view(x.shape)


class ExpertChoiceColumns(ExpertChoice):
    def forward(self, x):
        flat = x.view(-1, D)
        weights, tokens = self.gate(flat).softmax(-1).topk(self.capacity, dim=0)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            done = expert(flat[tokens[:, e]]) * weights[:, e, None]
            out = out.index_add(0, tokens[:, e], done)
        return out.view(x.shape)


@pytest.mark.parametrize("block", [ExpertChoice, ExpertChoiceColumns])
def test_expert_choice_is_refused_by_name(block, tmp_path):
    refused(block, tmp_path / "run", r"experts choose tokens .* expert choice cannot be recorded")


def test_expert_choice_with_as_many_slots_as_tokens_or_choices_is_refused_too(tmp_path):
    for capacity in (24, K, E):
        block = type("Sized", (ExpertChoice,), {"capacity": capacity})
        refused(block, tmp_path / str(capacity), "expert choice")


class Blend(nn.Module):
    """A soft mixture, not named so: all experts, each with its share."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def forward(self, x):
        w = self.gate(x).softmax(-1)
        return sum(w[..., e, None] * expert(x) for e, expert in enumerate(self.experts))


class SlotBlend(nn.Module):
    """Soft MoE (arXiv 2308.00951), not named so: experts compute blends of tokens."""

    def __init__(self):
        super().__init__()
        self.phi_gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def forward(self, x):
        logits = self.phi_gate(x)
        slots = logits.softmax(1).transpose(1, 2) @ x
        y = torch.stack([expert(slots[:, e]) for e, expert in enumerate(self.experts)], 1)
        return logits.softmax(-1) @ y


def test_a_soft_mixture_is_refused_whatever_its_name(tmp_path):
    refused(Blend, tmp_path / "a", "nothing in it chooses experts for a token")
    refused(SlotBlend, tmp_path / "b", "nothing in it chooses|no tensor of ids")
    named = type("SoftMixture", (Blend,), {})
    with pytest.raises(moe_lens.UnsupportedRouter, match="is a soft mixture"):
        moe_lens.record(small(named), tmp_path / "c")


class Capacity(TutorialMoE):
    """Drops what an expert has no room for; the ids do not say so."""

    room = 4

    def forward(self, x):
        gates, ids = self.router(x)
        flat, flat_gates = x.view(-1, D), gates.view(-1, E)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1).view(-1).nonzero().squeeze(1)[: self.room]
            out[rows] += expert(flat[rows]) * flat_gates[rows, e].unsqueeze(1)
        return out.view(x.shape)


class PaddedCapacity(Capacity):
    """As GShard: each expert gets C rows, whatever was chosen."""

    def forward(self, x):
        gates, ids = self.router(x)
        flat, w = x.view(-1, D), gates.view(-1, E)
        mask = F.one_hot(ids.view(-1, K), E).sum(1)
        place = mask.cumsum(0) * mask - 1
        slot = (
            F.one_hot(place.clamp(0, self.room - 1), self.room)
            * ((place >= 0) & (place < self.room))[..., None]
        )
        given = torch.einsum("tec,td->ecd", slot.float(), flat)
        y = torch.stack([expert(given[e]) for e, expert in enumerate(self.experts)])
        return torch.einsum("tec,te,ecd->td", slot.float(), w, y).view(x.shape)


def test_drops_that_the_ids_do_not_tell_are_refused_at_first_and_a_breach_later(tmp_path):
    refused(Capacity, tmp_path / "a", "does it drop tokens")
    refused(PaddedCapacity, tmp_path / "b", "does it drop tokens")
    model, run = small(Capacity), tmp_path / "later"
    model.blocks[0].room = 24
    with torch.no_grad(), moe_lens.record(model, run) as rec:
        with rec.step():
            model(IDS)
        model.blocks[0].room = 4
        with pytest.raises(moe_lens.CaptureBreach, match="another number of tokens than the ids"):
            with rec.step():
                model(IDS)
            rec.flush()


class Rectified(SoftmaxTopk):
    """Some chosen experts have a weight of zero, and so no part in the output."""

    def route(self, logits):
        weights, ids = logits.topk(self.top_k, dim=-1)
        return weights.relu(), ids


class Silenced(SoftmaxTopk):
    """Computes what was chosen, then throws a part of it away: the weights do not say so."""

    def forward(self, x):
        y, logits = super().forward(x)
        return y * (x.sum(-1, keepdim=True) > 0), logits


def test_a_choice_without_effect_needs_a_weight_of_zero(tmp_path):
    model, run = small(Rectified), tmp_path / "run"
    model.embed.weight.data -= 0.4 * model.blocks[0].gate.weight.sum(0)  # so that logits are low
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        for _ in range(2):
            with rec.step():
                model(IDS)
    logits = model.blocks[0].gate(model.embed(IDS).view(-1, D))
    top, ids = logits.topk(K, dim=-1)
    assert (top < 0).any()
    rows = frame(run, "routing").query("step == 1").sort_values("token")
    assert (np.stack(rows.weights) == top.relu().detach().numpy()).all()
    assert (ids_of(run, step=1) == ids.numpy()).all()
    refused(Silenced, tmp_path / "b", "the output of that token did not change|put out of action")


class WeighsInput(Top1):
    """The weight stands on the input of experts with biases: zero there is not silence."""

    def forward(self, x):
        flat = x.reshape(-1, D)
        weight, ids = self.switch(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts.values()):
            out[ids == e] = expert(flat[ids == e] * weight[ids == e, None])
        return out.view(x.shape)


def test_weights_that_do_something_else_than_weigh_are_refused_not_recorded_as_ones(tmp_path):
    refused(WeighsInput, tmp_path / "run", "with what weights is not")


class Restless(SoftmaxTopk):
    """Chance that nobody can put back."""

    chance = np.random.default_rng(0)

    def route(self, logits):
        return super().route(
            logits + torch.from_numpy(self.chance.normal(size=logits.shape)).float()
        )


class Remembering(SoftmaxTopk):
    """State in an object of its own: the second call is another one than the first."""

    class Counter:
        calls = 0

    def route(self, logits):
        self.Counter.calls += 1
        return super().route(logits * (-1.0) ** self.Counter.calls)


def test_a_block_that_cannot_be_run_twice_is_refused_with_the_reason(tmp_path):
    refused(Restless, tmp_path / "a", "gave different outputs")
    refused(Remembering, tmp_path / "b", "gave different outputs")


class Mixing(SoftmaxTopk):
    """What an expert does to one token reaches the others."""

    def forward(self, x):
        y, logits = super().forward(x)
        return y - y.mean(1, keepdim=True), logits


def test_a_block_that_mixes_tokens_behind_its_experts_is_refused(tmp_path):
    refused(Mixing, tmp_path / "run", r"with expert \d put out of action the outputs of \d+ tokens")


class Wrong(SoftmaxTopk):
    """Its ids are for show: the experts run by another rule."""

    def forward(self, x):
        flat = x.view(-1, D)
        weights, ids = self.route(self.gate(flat))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            out = out + expert(flat) * (flat[:, e] > 0)[:, None]
        return out.view(x.shape) + 0 * ids.sum() * weights.sum(), None


def test_ids_that_do_not_say_what_runs_are_refused_with_what_differs(tmp_path):
    refused(
        Wrong,
        tmp_path / "run",
        r"put out of action .* looks like its ids \(topk, .*inline_models.py:\d+",
    )


# ---- false friends -------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """All experts, averaged."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


class Gated(nn.Module):
    """A gated linear unit, a list of equal layers and a router that is no router."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, 4)
        self.up = nn.Linear(D, 4)
        self.router = nn.Linear(4, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.router(F.silu(self.gate(x)) * self.up(x))


class HeadGates(nn.Module):
    """Attention-like: a matrix a head and a gate for each, no choice."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.empty(4, D, D))
        self.gate = nn.Linear(D, 4)

    def forward(self, x):
        return torch.einsum("bsd,hdf,bsh->bsf", x, self.heads, self.gate(x).sigmoid())


class Monitored(Blend):
    """A soft mixture that also notes which expert weighs most."""

    def forward(self, x):
        self.favourite = self.gate(x).argmax(-1)
        return super().forward(x)


def test_what_looks_like_an_moe_and_is_not_is_named_and_the_rest_recorded(tmp_path):
    for block in (Ensemble, Gated, HeadGates, Blend):
        model, run = small(block, SoftmaxTopk), tmp_path / block.__name__
        with pytest.warns(UserWarning, match=r"blocks\.0 \(\w+\) looks like an MoE block: nothing"):
            with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
                for _ in range(2):
                    with rec.step():
                        model(IDS)
        meta = open_run(run).meta
        assert [x.path for x in meta.layers] == ["blocks.1"]
        assert [n for text, n in meta.warnings.items() if "blocks.0" in text] == [1]
        assert frame(run, "steps").breaches.sum() == 0
        assert len(frame(run, "routing")) == 2 * 24


def test_what_only_looks_like_one_is_refused_where_there_is_nothing_else(tmp_path):
    for block in (Ensemble, Gated, HeadGates):
        refused(block, tmp_path / block.__name__, "no MoE layer that can be recorded")


def test_a_number_that_is_only_noted_is_not_taken_for_a_choice(tmp_path):
    refused(Monitored, tmp_path / "run", "put out of action the outputs of 24 tokens changed")


def test_one_refused_block_does_not_keep_the_others_from_being_recorded(tmp_path):
    model, run = small(Mixing, SoftmaxTopk), tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0) as rec:
        with pytest.raises(moe_lens.UnsupportedRouter, match=r"blocks\.0 \(Mixing\)"), rec.step():
            model(IDS)
        for _ in range(2):  # told once
            with rec.step():
                model(IDS)
    assert [x.path for x in open_run(run).meta.layers] == ["blocks.1"]
    assert frame(run, "steps").breaches.tolist() == [1, 0, 0]
    assert len(frame(run, "routing")) == 3 * 24


def test_refusals_can_be_warnings_that_are_counted(tmp_path):
    model, run = small(Mixing, SoftmaxTopk), tmp_path / "run"
    with pytest.warns(UserWarning, match=r"blocks\.0 \(Mixing\) looks like an MoE block, but"):
        with torch.no_grad(), moe_lens.record(model, run, on_breach="warn") as rec, rec.step():
            model(IDS)
    assert frame(run, "steps").breaches.tolist() == [1]


def test_a_model_that_looks_like_one_because_of_its_layers_is_not_taken_for_one(tmp_path):
    class Net(Model):
        def __init__(self):
            super().__init__()
            self.moe_layers = nn.ModuleList((Top1(), Top1()))
            self.gate = nn.Linear(D, 2)

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.moe_layers:
                x = x + block(x)
            return self.gate(x)

    torch.manual_seed(0)
    model, run = Net().eval(), tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run) as rec, rec.step():
        model(IDS)
    meta = open_run(run).meta
    assert [x.path for x in meta.layers] == ["moe_layers.0", "moe_layers.1"]
    assert not meta.warnings


def test_a_block_that_is_an_moe_by_name_alone_is_told_at_once(tmp_path):
    class OddMoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Linear(D, D)

        def forward(self, x):
            return self.weights(x)

    model = small(OddMoE, SoftmaxTopk)
    with pytest.warns(UserWarning, match=r"blocks\.0 \(OddMoE\) is an MoE block by name"):
        rec = moe_lens.record(model, tmp_path / "run")
    with rec, rec.step(), torch.no_grad():
        model(IDS)
    assert any("OddMoE" in text for text in open_run(tmp_path / "run").meta.warnings)


def test_stacked_experts_under_a_soft_gate_are_refused(tmp_path):
    class SoftStack(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, E)
            self.experts = GroupedExperts()

        def forward(self, x):
            w = self.router(x).softmax(-1)
            left, right = torch.einsum("bsd,edf->bsef", x, self.experts.fc1).chunk(2, -1)
            y = torch.einsum("bsef,efd->bsed", F.silu(left) * right, self.experts.fc2)
            return (y * w.unsqueeze(-1)).sum(-2)

    refused(SoftStack, tmp_path / "run", "nothing in it chooses experts")


def test_nothing_warns_on_a_model_that_is_recorded_in_full(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small(SoftmaxTopk, Top1)
        with torch.no_grad(), moe_lens.record(model, tmp_path / "run") as rec, rec.step():
            model(IDS)
