"""DeepSpeed-MoE: what is recorded is what its gate dispatches, drops and all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.moe.sharded_moe import MOELayer
from support import deepspeed_on_cpu
from support.deepspeed_on_cpu import D, E
from support.probe import assert_equal, captured, first_come, one_hot
from support.tables import read
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import moe_lens
from moe_lens.errors import CaptureBreach, UnsupportedRouter

B, S = 2, 32
T = B * S

GATES = {
    "k=1": {"k": 1},
    "k=1 in order": {"k": 1, "use_rts": False},
    "k=1 noisy": {"k": 1, "noisy_gate_policy": "RSample"},
    "k=1 jitter": {"k": 1, "noisy_gate_policy": "Jitter"},
    "k=1 dropless": {"k": 1, "drop_tokens": False},
    "k=2": {"k": 2},
    "k=2 not sampled": {"k": 2, "top2_2nd_expert_sampling": False},
    "k=2 dropless": {"k": 2, "drop_tokens": False},
    "k=3": {"k": 3},
}


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory):
    deepspeed_on_cpu.join(str(tmp_path_factory.mktemp("group") / "store"))
    yield
    torch.distributed.destroy_process_group()


def make(gate="k=2", cf=0.8, **kw):
    return deepspeed_on_cpu.layer(**GATES[gate], capacity_factor=cf, eval_capacity_factor=cf, **kw)


class OneHot(nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, x):
        return one_hot(self.expert, x)


def probe(model):
    model.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(OneHot(e) for e in range(E))
    return model


@pytest.fixture(params=GATES)
def model(request):
    return make(request.param)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(B, S, D)


def recorded(model, x, run, used=None, **kw):
    torch.manual_seed(2)  # gates draw
    with moe_lens.record(model, run, tokens=1.0, weights="exact", **kw) as rec:
        with rec.step(["a", "b"]):
            return model(x, used)[0]


def test_ids_and_weights_are_those_that_were_executed(model, x, tmp_path):
    out = recorded(probe(model), x, tmp_path / "run")
    ran = assert_equal(captured(tmp_path / "run"), out, E)
    load = read(tmp_path / "run", "load").to_pandas()
    for row in load.itertuples():
        mine = ran[:S] if row.tag == "a" else ran[S:]
        assert row.processed == mine[:, row.expert].sum()
    assert load.routed.sum() == T * model.deepspeed_moe.gate.k
    assert (load.dropped.sum() > 0) == model.deepspeed_moe.gate.drop_tokens


def test_ablating_an_expert_changes_exactly_its_tokens(model, x, tmp_path):
    whole = recorded(model, x, tmp_path / "run").detach().reshape(T, D)
    ran = ~np.isnan(captured(tmp_path / "run").executed(E))
    for e in range(E):
        last = model.deepspeed_moe.experts.deepspeed_experts[e][2]
        kept = [p.detach().clone() for p in last.parameters()]
        with torch.no_grad():
            for p in last.parameters():
                p.zero_()
            torch.manual_seed(2)
            changed = (model(x)[0].reshape(T, D) != whole).any(-1).numpy()
            for p, old in zip(last.parameters(), kept, strict=True):
                p.copy_(old)
        assert (changed == ran[:, e]).all()


def test_choices_before_dropping_are_the_router_s(model, x, tmp_path):
    """Against the gate's weight in float64, and DeepSpeed's own count before it drops."""
    recorded(model, x, tmp_path / "run")
    gate, got = model.deepspeed_moe.gate, captured(tmp_path / "run")
    load = read(tmp_path / "run", "load").to_pandas()
    counts = load.groupby("expert").routed.sum().reindex(range(E), fill_value=0)
    assert counts.tolist() == model.deepspeed_moe.exp_counts.tolist()
    if gate.noisy_gate_policy is not None:
        return  # its noise is in no tensor
    z = x.reshape(T, D).double().numpy() @ gate.wg.weight.detach().double().numpy().T
    sure = 1 if gate.k == 2 and gate.top2_2nd_expert_sampling else gate.k
    order = np.argsort(-z, 1)[:, :sure]
    assert [ids[:sure] for ids in got.ids] == order.tolist()


@pytest.mark.parametrize("gate", [g for g in GATES if "dropless" not in g])
@pytest.mark.parametrize("cf", [0.5, 0.8, 8.0])
def test_drops_are_those_of_a_naive_count(gate, cf, x, tmp_path):
    model = make(gate, cf)
    recorded(model, x, tmp_path / "run")
    got, k = captured(tmp_path / "run"), GATES[gate]["k"]
    capacity = max(math.ceil(T / E * cf * k), 4)
    layers = read(tmp_path / "run", "layers").to_pandas()
    assert layers.capacity.tolist() == [capacity]
    choosers = [[(t, ids.index(e)) for t, ids in enumerate(got.ids) if e in ids] for e in range(E)]
    if gate == "k=3":  # the most probable of its choosers stay with each expert
        z = x.reshape(T, D).double().numpy() @ (
            model.deepspeed_moe.gate.wg.weight.detach().double().numpy().T
        )
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        want = [[] for _ in got.ids]
        for e, mine in enumerate(choosers):
            for t, slot in sorted(mine, key=lambda at: -p[at[0], e])[capacity:]:
                want[t].append(slot)
        assert [sorted(d) for d in got.dropped] == [sorted(d) for d in want]
    elif k == 2:
        assert got.dropped == first_come(got, capacity, T, slot_by_slot=True)
    else:  # at random, or as torch's topk breaks ties: who, it does not promise
        for mine in choosers:
            lost = sum(slot in got.dropped[t] for t, slot in mine)
            assert lost == max(len(mine) - capacity, 0)
    assert (sum(map(len, got.dropped)) > 0) == (cf < 1)


def test_the_router_is_described(model, x, tmp_path):
    recorded(model, x, tmp_path / "run")
    said = json.loads((tmp_path / "run" / "meta" / "rank=0.json").read_text())["layers"][0]
    gate = model.deepspeed_moe.gate
    assert (said["experts"], said["top_k"], said["score"]) == (E, gate.k, "softmax")
    drawn = gate.noisy_gate_policy == "RSample" or (gate.k == 2 and gate.top2_2nd_expert_sampling)
    assert said["selection"] == (None if drawn else "logits")
    policies = {1: "drop-at-random", 2: "drop-by-position", 3: "drop-by-probability"}
    if gate.k == 1 and not gate.use_rts:
        policies[1] = "drop-by-position"
    assert said["capacity_policy"] == (policies[gate.k] if gate.drop_tokens else None)


def test_logits_are_those_before_noise(model, x, tmp_path):
    run = tmp_path / "run"
    recorded(model, x, run, logits=True)
    gate = model.deepspeed_moe.gate
    if gate.noisy_gate_policy == "Jitter":  # is on the gate's input, and only while training
        model.eval()
        run = tmp_path / "eval"
        recorded(model, x, run, logits=True)
    z = x.reshape(T, D) @ gate.wg.weight.detach().T
    rows = read(run, "logits").to_pandas().sort_values("token")
    np.testing.assert_allclose(np.stack(rows.logits), z, rtol=2**-8, atol=1e-5)


class DenseLayer(MOELayer):
    """The layer as DeepSpeed had it before sparse routes: the gate's masks, two einsums."""

    def forward(self, *input, **kwargs):
        x = input[0].reshape(-1, D)
        self.l_aux, combine, dispatch, self.exp_counts = self.gate(x, input[1])
        rows = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x)
        y = self.experts(rows.reshape(1, E, -1, D)).reshape(E, -1, D)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), y).reshape(input[0].shape)


def test_dense_masks_are_read_too(model, x, tmp_path):
    sparse = recorded(probe(model), x, tmp_path / "sparse")
    model.deepspeed_moe.__class__ = DenseLayer
    dense = recorded(model, x, tmp_path / "dense")
    assert torch.allclose(sparse, dense)
    got = captured(tmp_path / "dense")
    assert_equal(got, dense, E)
    assert got.dropped == captured(tmp_path / "sparse").dropped


@pytest.mark.parametrize("dense", [False, True])
def test_tokens_that_are_not_used_make_no_choice(dense, x, tmp_path):
    model = probe(make("k=1"))
    used = torch.arange(T) % 3 != 0
    if dense:
        model.deepspeed_moe.__class__ = DenseLayer
    out = recorded(model, x, tmp_path / "run", used)
    got = captured(tmp_path / "run")
    assert_equal(got, out, E)
    assert [len(ids) for ids in got.ids] == used.long().tolist()
    load = read(tmp_path / "run", "load").to_pandas()
    assert load.routed.sum() == used.sum()


def test_gradients_are_the_same_with_recording_on(model, x, tmp_path):
    def gradients(run=None):
        model.zero_grad()
        torch.manual_seed(2)
        y = model(x)[0] if run is None else recorded(model, x, run)
        (y.square().sum() + model.deepspeed_moe.l_aux).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(), gradients(tmp_path / "run"), strict=True):
        assert torch.equal(a, b)


def test_a_residual_block_in_a_model(x, tmp_path):
    model = nn.ModuleDict({"moe": make("k=2", use_residual=True)})
    model.forward = lambda x, used: model["moe"](x, used)
    recorded(model, x, tmp_path / "run")
    assert read(tmp_path / "run", "load").to_pandas().routed.sum() == 2 * T


def test_a_gate_of_another_kind_is_refused(tmp_path):
    model = make()
    model.deepspeed_moe.gate = nn.Linear(D, E)
    with pytest.raises(UnsupportedRouter, match="has a Linear for a gate"):
        moe_lens.record(model, tmp_path / "run")


def test_a_gate_that_dispatches_other_experts_is_a_breach(x, tmp_path):
    model = make("k=2")
    gate = model.deepspeed_moe.gate
    forward = gate.forward

    def shifted(*args):
        loss, C, experts, ids, *rest = forward(*args)
        return loss, C, experts, torch.where(ids < 0, ids, (ids + 1) % E), *rest

    gate.forward = shifted
    with pytest.raises(CaptureBreach, match="experts ran other tokens than the gate chose"):
        recorded(model, x, tmp_path / "run")


def test_autoep_in_the_place_of_a_transformers_block(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=D, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=E, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 64, (B, S))
    with torch.no_grad(), moe_lens.record(model, tmp_path / "hf", tokens=1.0) as rec, rec.step():
        model(input_ids=ids)
    auto = AutoEP(model, AutoEPConfig(enabled=True))
    for spec in auto.ep_parser():  # its own replace_moe_layer fails on transformers 5.23
        auto._replace_moe_layer_without_retarget(spec, ep_size=1, ep_rank=0)
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        with rec.step():
            model(input_ids=ids)
    block, calls = model.model.layers[0].mlp, []
    block.register_forward_hook(lambda m, args, y: calls.append((args[0], y.clone())))
    with torch.no_grad():
        model(input_ids=ids)
    (inputs, whole), *_ = calls
    got = captured(run)
    assert [set(a) for a in got.ids] == [set(a) for a in captured(tmp_path / "hf").ids]
    ran = ~np.isnan(got.executed(E))
    for e in range(E):
        with torch.no_grad():
            kept = block.experts.w2[e].clone()
            block.experts.w2[e] = 0
            changed = (block(inputs) != whole).reshape(T, D).any(-1).numpy()
            block.experts.w2[e] = kept
        assert (changed == ran[:, e]).all()
    said = json.loads((run / "meta" / "rank=0.json").read_text())["layers"]
    assert [x["adapter"] for x in said] == ["autoep", "autoep"]
    assert said[0]["score"] == "softmax"
