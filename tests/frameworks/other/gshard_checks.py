"""mixture-of-experts and st-moe-pytorch: what is recorded is what their masks execute."""

from __future__ import annotations

import json
import math

import mixture_of_experts
import numpy as np
import pytest
import st_moe_pytorch
import torch
from support.probe import assert_equal, captured, first_come, one_hot
from support.tables import read
from torch import nn

import moe_lens
from moe_lens.errors import CaptureBreach, UnsupportedRouter

B, N, D, E = 3, 40, 16, 8


def mixture(policy="random", cf=1.0, experts=None):
    names = {f"second_policy_{when}": policy for when in ("train", "eval")}
    factors = {f"capacity_factor_{when}": cf for when in ("train", "eval")}
    return mixture_of_experts.MoE(dim=D, num_experts=E, experts=experts, **names, **factors)


def st_moe(top_n=2, cf=1.0, **kw):
    factors = {f"capacity_factor_{when}": cf for when in ("train", "eval")}
    return st_moe_pytorch.MoE(dim=D, num_experts=E, gating_top_n=top_n, **factors, **kw)


MAKES = {
    "mixture random": lambda: mixture("random"),
    "mixture all": lambda: mixture("all"),
    "mixture none": lambda: mixture("none"),
    "mixture with room": lambda: mixture("all", cf=8.0),
    "st-moe": st_moe,
    "st-moe top-3": lambda: st_moe(top_n=3, cf=1.5),
    "st-moe not straight through": lambda: st_moe(straight_through_dispatch_tensor=False),
    "st-moe differentiable": lambda: st_moe(differentiable_topk=True),
}


class OneHots(nn.Module):
    def forward(self, x):  # [E, B C, D]
        return torch.stack([one_hot(e, rows) for e, rows in enumerate(x)])


class OneHot(nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, x):
        return one_hot(self.expert, x)


def probe(model):
    """Make the experts answer with their own number."""
    if isinstance(model, mixture_of_experts.MoE):
        model.experts = OneHots()
    else:
        model.experts.experts = nn.ModuleList(OneHot(e) for e in range(E))


@pytest.fixture(params=MAKES)
def model(request):
    torch.manual_seed(0)
    return MAKES[request.param]().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(B, N, D)


def recorded(model, x, run, **kw):
    torch.manual_seed(2)  # second choices are drawn
    with moe_lens.record(model, run, tokens=1.0, weights="exact", **kw) as rec, rec.step("a"):
        out = model(x)
    return out[0]


def test_ids_and_weights_are_those_that_were_executed(model, x, tmp_path):
    probe(model)
    out = recorded(model, x, tmp_path / "run")
    got = captured(tmp_path / "run")
    ran = assert_equal(got, out, E)
    load = read(tmp_path / "run", "load").to_pandas()
    assert load.groupby("expert").processed.sum().to_dict() == dict(enumerate(ran.sum(0)))


def test_ablating_an_expert_changes_exactly_its_tokens(model, x, tmp_path):
    whole = recorded(model, x, tmp_path / "run").detach().reshape(-1, D)
    ran = ~np.isnan(captured(tmp_path / "run").executed(E))
    for e in range(E):
        kept = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            if isinstance(model, mixture_of_experts.MoE):
                model.experts.w2[e] = 0
            else:
                for p in model.experts.experts[e].parameters():
                    p.zero_()
            torch.manual_seed(2)
            changed = (model(x)[0].reshape(-1, D) != whole).any(-1).numpy()
            for n, p in model.named_parameters():
                p.copy_(kept[n])
        assert (changed == ran[:, e]).all()


def test_drops_are_those_of_a_naive_count(model, x, tmp_path):
    recorded(model, x, tmp_path / "run")
    got = captured(tmp_path / "run")
    cf = model.gate.capacity_factor_eval
    capacity = max(min(N, int(N * cf / E)), 4)
    assert got.dropped == first_come(got, capacity, group=N, slot_by_slot=True)
    load = read(tmp_path / "run", "load").to_pandas()
    assert load.dropped.sum() == load.overflowed.sum() == sum(map(len, got.dropped))
    assert (load.dropped.sum() > 0) == (cf < 4)
    assert read(tmp_path / "run", "layers").to_pandas().capacity.tolist() == [capacity]


@pytest.mark.parametrize("policy", ["random", "all", "none"])  # "threshold" fails by itself
def test_second_choices_are_made_as_the_policy_draws_them(policy, x, tmp_path):
    torch.manual_seed(0)
    model = mixture(policy).eval()
    recorded(model, x, tmp_path / "run")
    got = captured(tmp_path / "run")
    z = x.reshape(-1, D).double().numpy() @ model.gate.w_gating.detach().double().numpy()
    torch.manual_seed(2)
    draws = torch.zeros(B, N).uniform_(0.0, 1.0).flatten().numpy()
    for t, ids in enumerate(got.ids):
        order = np.argsort(-z[t])
        p = np.exp(z[t][order[:2]] - z[t][order[0]])
        second = p[1] / p.sum()
        made = {"random": draws[t] < second / 0.2, "all": True, "none": False}[policy]
        assert ids == order[: 1 + made].tolist()


def test_a_router_with_optional_choices_is_named_dynamic(tmp_path, x):
    for policy, kind, top_k in (("random", "dynamic-k", None), ("all", "token-choice", 2)):
        run = tmp_path / policy
        torch.manual_seed(0)
        recorded(mixture(policy).eval(), x, run)
        layer = json.loads((run / "meta" / "rank=0.json").read_text())["layers"][0]
        assert (layer["router"], layer["top_k"]) == (kind, top_k)
        assert (layer["score"], layer["selection"]) == ("softmax", "logits")
        assert layer["capacity_policy"] == "drop-by-position"


@pytest.mark.parametrize("make", ["mixture random", "st-moe"])
def test_entropy_and_margin_equal_a_naive_loop(make, x, tmp_path):
    torch.manual_seed(0)
    model = MAKES[make]().eval()
    recorded(model, x, tmp_path / "run")
    w = getattr(model.gate, "w_gating", None)
    w = model.gate.to_gates.weight.T if w is None else w
    z = x.reshape(-1, D).double().numpy() @ w.detach().double().numpy()
    rows = read(tmp_path / "run", "routing").to_pandas().sort_values("token")
    for row, logits in zip(rows.itertuples(), z, strict=True):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        assert row.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=2**-7)
        order = np.argsort(-logits)
        k = len(row.expert_ids)
        margin = logits[order[k - 1]] - logits[order[k]]
        assert row.margin == pytest.approx(margin, rel=2**-6, abs=1e-5)


def test_noise_on_the_gates_is_in_what_was_chosen(x, tmp_path):
    torch.manual_seed(0)
    model = st_moe().eval()
    probe(model)
    run = tmp_path / "run"
    torch.manual_seed(2)
    with moe_lens.record(model, run, tokens=1.0, weights="exact", logits=True) as rec:
        with rec.step("a"):
            out = model(x, noise_gates=True)[0]
    got = captured(run)
    assert_equal(got, out, E)
    noisy = np.stack(read(run, "logits").to_pandas().sort_values("token").logits)
    quiet = model.gate.to_gates(x.reshape(-1, D)).detach().numpy()
    assert not np.allclose(noisy, quiet, atol=0.1)
    assert [ids[0] for ids in got.ids] == noisy.argmax(1).tolist()


def test_training_records_the_same_and_changes_no_gradient(model, x, tmp_path):
    model.train()

    def gradients(run=None):
        torch.manual_seed(2)
        model.zero_grad()
        if run is None:
            out = model(x)
            (out[0].square().sum() + out[1]).backward()
        else:
            with moe_lens.record(model, run, tokens=1.0) as rec, rec.step("a"):
                out = model(x)
                (out[0].square().sum() + out[1]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(), gradients(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)
    assert read(tmp_path / "run", "steps").to_pandas().phase.tolist() == ["train"]


def test_the_block_inside_a_model_is_found(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), st_moe_pytorch.SparseMoEBlock(st_moe())).eval()
    recorded(model, x, tmp_path / "run")
    load = read(tmp_path / "run", "load").to_pandas()
    choices = sum(map(len, captured(tmp_path / "run").ids))
    assert B * N < choices <= B * N * 2
    assert load.routed.sum() == choices


def test_two_levels_are_refused(tmp_path):
    model = mixture_of_experts.HeirarchicalMoE(dim=D, num_experts=(2, 4))
    with pytest.raises(UnsupportedRouter, match="two levels"):
        moe_lens.record(model, tmp_path / "run")


def test_a_gate_of_another_kind_is_refused(tmp_path):
    model = mixture()
    model.gate = nn.Linear(D, E)
    with pytest.raises(UnsupportedRouter, match="has a Linear for a gate"):
        moe_lens.record(model, tmp_path / "run")


def test_masks_that_do_not_hold_what_the_gate_chose_are_a_breach(x, tmp_path):
    class Shifted(mixture_of_experts.mixture_of_experts.Top2Gating):
        def forward(self, x, importance=None):
            dispatch, combine, loss = super().forward(x, importance)
            return dispatch.roll(1, 2), combine.roll(1, 2), loss  # its neighbour runs instead

    model = mixture("all", cf=math.inf).eval()
    gate = Shifted(D, E, second_policy_eval="all", capacity_factor_eval=8.0)
    gate.load_state_dict(model.gate.state_dict())
    model.gate = gate.eval()
    with pytest.raises(CaptureBreach, match="slots of experts that hold no choice of the gate"):
        recorded(model, x, tmp_path / "run")
