"""Router rows, expert cosines and selection biases of real models, and what was planted in them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.models import VOCAB, TinyModel, build, switch
from support.zoo import ZOO
from support.zoo import build as build_any
from torch import nn

import moe_lens
from moe_lens.errors import NoMoELayers
from moe_lens.metrics import similarity
from moe_lens.metrics.catalogue import METRICS, measure, metrics
from moe_lens.queries.evidence import evidence
from moe_lens.queries.session import one_run
from moe_lens_hooks import expert_cosines, router_rows, selection_biases

assert "bias_changed" in metrics()

A, B = 2, 5
"""The expert that is copied, and the one that it replaces."""


def duplicate(model, names):
    """Put a copy of expert A, router row included, in the place of B, in the first MoE block."""
    with torch.no_grad():
        for name in names:
            tensor = model.get_parameter(name)
            tensor[B] = tensor[A]


MIXTRAL = "model.layers.0.mlp"
STACKED = [f"{MIXTRAL}.{x}" for x in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]


def test_rows_are_those_that_make_the_logits():
    for name, path, matrix in (
        ("mixtral", "model.layers.{}.mlp", "gate.weight"),
        ("deepseek_v3", "model.layers.{}.mlp", "gate.weight"),
        ("gpt_oss", "model.layers.{}.mlp", "router.weight"),
    ):
        model = build(name)
        rows = router_rows(model)
        layers = (1, 2) if name == "deepseek_v3" else (0, 1, 2)  # its first block is dense
        assert list(rows) == [path.format(i) for i in layers]
        for i in layers:
            wanted = model.get_parameter(f"{path.format(i)}.{matrix}")
            assert np.array_equal(rows[path.format(i)], wanted.detach().numpy())


def test_a_duplicated_expert_has_similarity_1_and_nothing_else_has():
    model = build("mixtral")
    before = {p: similarity.pairs(c, 0.1) for p, c in expert_cosines(model).items()}
    assert all(found.empty for found in before.values())
    duplicate(model, STACKED)
    cosines, rows = expert_cosines(model), router_rows(model)
    for cosine in (cosines[MIXTRAL], similarity.cosines(rows[MIXTRAL])):
        chance = similarity.by_chance(8, rows[MIXTRAL].shape[1])
        found = similarity.pairs(cosine, chance.high)
        assert found[["expert", "other"]].to_numpy().tolist() == [[A, B]]
        assert found["cosine"][0] == pytest.approx(1, abs=1e-6)
    assert similarity.pairs(cosines["model.layers.1.mlp"], 0.1).empty
    # Redundant: whatever the second one answers to, the first one may answer instead.
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model)
    with torch.no_grad():
        gate = other.get_parameter(f"{MIXTRAL}.gate.weight")
        gate[[A, B]] = gate[[B, A]]
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_against_a_loop_over_experts():
    model = build("gpt_oss")
    experts = model.get_submodule(f"{MIXTRAL}.experts")
    flat = [
        torch.cat([p[e].detach().flatten() for p in experts.parameters() if p.ndim == 3]).double()
        for e in range(8)
    ]
    cosine = expert_cosines(model)[MIXTRAL]
    for a in range(8):
        for b in range(8):
            wanted = torch.nn.functional.cosine_similarity(flat[a], flat[b], dim=0)
            assert cosine[a, b] == pytest.approx(float(wanted), abs=1e-6)


def test_large_experts_are_read_in_parts(monkeypatch):
    model = build("mixtral")
    whole = expert_cosines(model)
    monkeypatch.setattr("moe_lens_hooks.weights._AT_ONCE", 1000)
    for path, cosine in expert_cosines(model).items():
        assert cosine == pytest.approx(whole[path], abs=1e-6)


def test_one_module_an_expert():
    model = switch()
    path = "encoder.block.1.layer.1.mlp"
    experts = model.get_submodule(f"{path}.experts")
    with torch.no_grad():
        for matrix in ("wi", "wo"):
            experts[f"expert_{B}"].get_submodule(matrix).weight.copy_(
                experts[f"expert_{A}"].get_submodule(matrix).weight
            )
    found = similarity.pairs(expert_cosines(model)[path], 0.5)
    assert found[["expert", "other"]].to_numpy().tolist() == [[A, B]]
    rows = router_rows(model)[path]
    wanted = model.get_submodule(f"{path}.router.classifier").weight
    assert np.array_equal(rows, wanted.detach().numpy())


def test_experts_that_are_flattened_along_one_matrix():
    model = build_any(ZOO["dbrx"])
    path = next(iter(expert_cosines(model)))
    experts = model.get_submodule(f"{path}.experts")
    with torch.no_grad():
        for p in experts.parameters():
            parts = p.chunk(8)
            parts[B].copy_(parts[A])
    found = similarity.pairs(expert_cosines(model)[path], 0.5)
    assert found[["expert", "other"]].to_numpy().tolist() == [[A, B]]


def test_neurons_in_another_order_hide_a_copy():
    """The limit that docs/similarity.md states."""
    model = build("mixtral")
    duplicate(model, STACKED)
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        experts = model.get_submodule(f"{MIXTRAL}.experts")
        F = experts.down_proj.shape[-1]
        order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
        experts.gate_up_proj[B] = experts.gate_up_proj[B][torch.cat([order, order + F])]
        experts.down_proj[B] = experts.down_proj[B][:, order]
        assert torch.allclose(model(ids).logits, before, atol=1e-4)
    assert abs(expert_cosines(model)[MIXTRAL][A, B]) < 0.2


def test_hash_routers_have_no_rows():
    rows = router_rows(build_any(ZOO["deepseek_v4"]))
    assert list(rows) == ["model.layers.1.mlp"]


def test_biases_that_choose_only():
    model = build("deepseek_v3")
    biases = selection_biases(model)
    assert list(biases) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    gate = model.get_submodule("model.layers.1.mlp.gate")
    kept = biases["model.layers.1.mlp"].copy()
    assert np.array_equal(kept, gate.e_score_correction_bias.numpy())
    gate.e_score_correction_bias.add_(1)
    assert np.array_equal(biases["model.layers.1.mlp"], kept)  # a copy of its time
    assert selection_biases(build("mixtral")) == {}
    # In transformers' Ernie it lies deeper and flat, in Zaya it has a place for the skip.
    assert {b.shape for b in selection_biases(build_any(ZOO["ernie4_5_moe"])).values()} == {(8,)}
    assert {b.shape for b in selection_biases(build_any(ZOO["zaya"])).values()} == {(9,)}


def test_halves_and_models_without_experts():
    model = build("mixtral").bfloat16()
    assert router_rows(model)[MIXTRAL].dtype == np.float32
    assert expert_cosines(model)[MIXTRAL].diagonal() == pytest.approx(np.ones(8))
    for read in (router_rows, expert_cosines, selection_biases):
        with pytest.raises(NoMoELayers, match="has no MoE layer"):
            read(nn.Linear(3, 3))


def test_a_block_of_ones_own():
    model = TinyModel(experts=4, width=8)
    rows = router_rows(model)
    assert list(rows) == ["blocks.0", "blocks.1"]
    assert np.array_equal(rows["blocks.1"], model.blocks[1].gate.weight.detach().numpy())
    gate = model.blocks[1].gate
    gate.weight = nn.Parameter(gate.weight.detach().T.contiguous())  # a column for each expert
    gate.register_parameter("scale", nn.Parameter(torch.ones(1, 4)))
    assert np.array_equal(router_rows(model)["blocks.1"], rows["blocks.1"])
    model.blocks[0].register_buffer("expert_bias", torch.arange(4.0))  # as torchtitan has it
    assert {k: b.tolist() for k, b in selection_biases(model).items()} == {"blocks.0": [0, 1, 2, 3]}
    square = TinyModel(experts=8, width=8)  # rows or columns? not to be known
    assert router_rows(square) == {}
    assert set(expert_cosines(square)) == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("groups", [4, 1])
def test_what_a_bias_changes_in_a_recorded_model(groups, tmp_path):
    """Against the model's own router, run again without its bias."""
    model = build("deepseek_v3")
    gates = [model.get_submodule(f"model.layers.{i}.mlp.gate") for i in (1, 2)]
    for gate in gates:
        gate.n_group = gate.num_group = groups
        gate.topk_group = max(groups // 2, 1)
    ran = []
    for gate in gates:
        gate.register_forward_hook(lambda gate, args, out: ran.append((gate, args, out)))
    ids = torch.randint(3, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, logits=True) as rec, rec.step():
        model(ids)
    asked = [METRICS["bias_changed"]]
    with moe_lens.open(run) as trace:
        info = one_run(trace)
        for layer, (gate, args, out) in zip(info.layers, list(ran), strict=True):
            without = copy.deepcopy(gate)
            without._forward_hooks.clear()
            without.e_score_correction_bias.zero_()
            with torch.no_grad():
                ids_TK = without(*args)[2]
            pairs = zip(ids_TK.tolist(), out[2].tolist(), strict=True)
            wanted = np.mean([set(a) != set(b) for a, b in pairs])
            found = measure(asked[0], evidence(trace, info, layer, "eval", asked))
            assert found.chance is not None
            assert wanted > 0.1
            assert found.value == pytest.approx(wanted, abs=found.chance.high)
            assert found.chance.high < 0.03
            assert found.beyond == "high"


def test_without_a_bias_nothing_is_said_of_one(tmp_path):
    model, run = build("mixtral"), tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, logits=True) as rec, rec.step():
        model(torch.arange(3, 19)[None])
    with moe_lens.open(run) as trace:
        info = one_run(trace)
        known = evidence(trace, info, info.layers[0], "eval", [METRICS["bias_changed"]])
    assert measure(METRICS["bias_changed"], known).lacks == "no known selection bias"
