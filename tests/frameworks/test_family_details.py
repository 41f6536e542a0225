"""What is special in a family of transformers: skips, modalities, lookups, attention experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.odd_models import ODD, batch_of
from support.odd_recorded import record, relative, run
from support.tables import frame

import moe_lens
from moe_lens.errors import CaptureBreach
from moe_lens.trace.reader import open_run


def test_jetmoe_attention_experts_are_layers_of_their_own(tmp_path):
    """Their output is rebuilt from what `reduce` is given and what it gives back."""
    odd = ODD["jetmoe"]
    model = odd.build()
    calls = {}
    for path, module in model.named_modules():
        if type(module).__name__ == "JetMoeMoA":
            inner = module.reduce

            def reduce(x, topology, inner=inner, path=path):
                y = inner(x, topology)
                calls[path.removesuffix(".experts")] = x.flatten(0, 1), y.flatten(0, 1)
                return y

            module.reduce = reduce
    layers, meta = record(odd, model, batch_of("jetmoe"), tmp_path / "run")
    assert [x.info.role for x in layers] == ["attention", "mlp"] * 2
    assert meta.layers[0].path == "model.layers.0.self_attention"
    for layer in layers[::2]:
        x_TKH, y_TD = calls[layer.info.path]
        experts = layer.block.experts
        for x_KH, y_D, row in zip(x_TKH, y_TD, layer.rows.itertuples(), strict=True):
            parts = zip(x_KH, row.expert_ids, row.weights, strict=True)
            with torch.no_grad():
                again = sum(w * (experts.output_linear.weight[e] @ x_H) for x_H, e, w in parts)
                assert relative(again + experts.bias, y_D) < 1e-6


def test_jetmoe_expert_without_a_token(tmp_path):
    model = ODD["jetmoe"].build()
    for module in model.modules():
        if type(module).__name__ == "JetMoeTopKGating":
            with torch.no_grad():
                module.layer.weight[0] = module.layer.weight[1] - 10 * module.layer.weight.sum(0)
    batch = {"input_ids": torch.tensor([[5]])}
    _, routing, load = run(model, batch, tmp_path / "run")
    assert (load.groupby("layer").routed.sum() == 2).all()
    assert routing.expert_ids.map(len).eq(2).all()


def test_zaya_skips_are_the_zero_expert_and_no_load_on_expert_0(tmp_path):
    model = ODD["zaya"].build()
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer.zero_()[-1] = 0.1
    wishes = []
    for module in model.modules():
        if type(module).__name__ == "ZayaRouterMLP":
            module.register_forward_hook(lambda m, a, out: wishes.append(out.softmax(-1)))
    layers, _ = record(ODD["zaya"], model, batch_of("zaya"), tmp_path / "run")
    skipped = 0
    for layer, p_BSE in zip(layers, wishes[: len(layers)], strict=True):
        assert (layer.info.experts, layer.info.zero_experts) == (8, 1)
        wish = (p_BSE + layer.block.gate.balancing_biases).argmax(-1).flatten().tolist()
        assert [ids[0] for ids in layer.rows.expert_ids] == wish
        assert [w[0] == 0 for w in layer.rows.weights] == [e == 8 for e in wish]
        skipped += wish.count(8)
    assert 10 < skipped < 38
    load = frame(tmp_path / "run", "load")
    assert load[load.expert == 8].routed.sum() > 0


def test_zaya_expert_0_with_a_weight_of_zero_is_no_skip(tmp_path):
    """A bias can choose an expert whose probability is zero."""
    model = ODD["zaya"].build()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("balancing_biases"):
                buffer[0] = 5.0
        for name, weight in model.named_parameters():
            if name.endswith("out_proj.weight") and "router" in name:
                weight.mul_(1e5)  # every other probability underflows
    _, routing, _ = run(model, batch_of("zaya"), tmp_path / "run")
    assert (np.concatenate(routing.expert_ids.to_numpy()) == 0).all()
    assert (np.concatenate(routing.weights.to_numpy()) == 0).any()


def test_longcat_identity_experts_count_but_are_no_experts(tmp_path):
    layers, _ = record(
        ODD["longcat_flash"],
        ODD["longcat_flash"].build(),
        batch_of("longcat_flash"),
        tmp_path / "run",
    )
    for layer in layers:
        assert (layer.info.experts, layer.info.zero_experts, layer.info.top_k) == (8, 4, 3)
        ids = np.concatenate(layer.rows.expert_ids.to_numpy())
        assert (ids >= 8).any()
        assert (ids < 12).all()


def test_deepseek_v4_hash_layers_have_ids_by_token_and_no_entropy(tmp_path):
    model, batch = ODD["deepseek_v4"].build(), batch_of("deepseek_v4")
    meta, routing, _ = run(model, batch, tmp_path / "run")
    assert [x.router for x in meta.layers] == ["hash", "token-choice"]
    assert (meta.layers[0].score, meta.layers[0].selection) == (None, None)
    first = routing[routing.layer == 0].sort_values("token")
    table = model.model.layers[0].mlp.gate.tid2eid
    assert np.stack(first.expert_ids).tolist() == table[batch["input_ids"].flatten()].tolist()
    assert first.entropy.isna().all()
    assert first.margin.isna().all()
    assert first.next_ids.isna().all()
    routers = frame(tmp_path / "run", "routers")
    hashed = routers[routers.layer == 0]
    assert len(hashed) > 0
    assert hashed[["entropy_sum", "margin_sum", "zloss_sum"]].isna().all().all()
    assert routers[routers.layer == 1].entropy_sum.notna().all()


def ernie(kinds):
    batch = batch_of("ernie4_5_vl_moe")
    return batch | {"moe_mm_token_type_ids": kinds}


def test_ernie_experts_see_the_tokens_of_their_modality_and_padding_is_marked(tmp_path):
    model = ODD["ernie4_5_vl_moe"].build()
    kinds = torch.zeros(2, 12, dtype=torch.int)
    kinds[0, 5:9], kinds[1, :2] = 1, 2
    batch = ernie(kinds)
    meta, routing, load = run(model, batch, tmp_path / "run")
    assert [x.path.split(".")[-1] for x in meta.layers] == ["text_moe", "vision_moe"] * 2
    valid = batch["attention_mask"].flatten().bool()
    for info in meta.layers:
        mine = (kinds.flatten() > 0) == info.path.endswith("vision_moe")
        rows = routing[routing.layer == info.layer]
        assert sorted(rows.token) == mine.nonzero().flatten().tolist()
        counted = load[load.layer == info.layer]
        assert counted.routed.sum() == 2 * int((mine & valid).sum())
        assert counted.padding.sum() == 2 * int((mine & ~valid).sum())
    layers = frame(tmp_path / "run", "layers")
    assert layers.tokens.tolist() == [15, 6] * 2


@pytest.mark.parametrize("kind", [0, 1])
def test_ernie_with_one_modality_only(kind, tmp_path):
    model = ODD["ernie4_5_vl_moe"].build()
    batch = ernie(torch.full((2, 12), kind))
    rec = moe_lens.record(model, tmp_path / "run", tokens=1.0)
    with torch.no_grad():
        for _ in range(2):
            with rec.step():
                model(**batch)
            batch = ernie(None)  # then without a word about modality, as generate decodes
    if kind:
        rec.close()
    else:
        with pytest.warns(UserWarning, match=r"2 MoE blocks never ran, layers.0.mlp.vision_moe"):
            rec.close()
    routing = frame(tmp_path / "run", "routing")
    paths = {x.layer: x.path for x in open_run(tmp_path / "run").meta.layers}
    used = {(r.step, paths[r.layer].split(".")[-1]) for r in routing.itertuples()}
    assert used == {(0, "vision_moe" if kind else "text_moe"), (1, "text_moe")}
    assert routing.groupby(["step", "layer"]).token.nunique().eq(24).all()


def test_ernie_block_that_splits_its_tokens_otherwise_is_a_breach(tmp_path):
    model = ODD["ernie4_5_vl_moe"].build()
    block = model.layers[0].mlp
    block.forward = lambda x, kinds=None: type(block).forward(block, x, None)  # all to text
    kinds = torch.zeros(2, 12, dtype=torch.int)
    kinds[0, 5:9] = 1
    with pytest.raises(CaptureBreach, match="tokens routed, not as many as are of this kind"):
        run(model, ernie(kinds), tmp_path / "run")


def test_llama4_experts_whose_score_rounds_to_zero_are_still_named(tmp_path):
    model = ODD["llama4_top2"].build()
    logits = []
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Llama4Router":
                # all experts of a token far above zero, or far below, where a sigmoid is zero
                module.weight.add_(400 * torch.randn(module.in_features))
                module.register_forward_hook(lambda m, a, out: logits.append(out))
    meta, routing, _ = run(model, batch_of("llama4_top2"), tmp_path / "run")
    zero = 0
    for info, (_, logits_TE) in zip(meta.layers, logits, strict=True):
        rows = routing[routing.layer == info.layer].sort_values("token")
        best = logits_TE.topk(2).indices
        assert [set(x) for x in rows.expert_ids] == [set(x) for x in best.tolist()]
        zero += sum((w == 0).any() for w in rows.weights)
    assert zero > 0


def test_vitpose_index_out_of_range_is_a_breach(tmp_path):
    model, batch = ODD["vitpose_backbone"].build(), batch_of("vitpose_backbone")
    meta, routing, _ = run(model, batch, tmp_path / "run")
    assert {x.router for x in meta.layers} == {"task"}
    assert routing.entropy.isna().all()
    batch["dataset_index"] = torch.tensor([4, 6, 2])
    with pytest.raises(CaptureBreach, match="expert ids out of range"):
        run(model, batch, tmp_path / "other")


SCALED = ["beam", "laguna", "minimax_m3_vl", "step3p7", "openai_privacy_filter"]


@pytest.mark.parametrize("name", SCALED)
def test_what_a_block_multiplies_by_after_its_experts_is_known(name, tmp_path):
    odd = ODD[name]
    key = {"laguna": "moe_routed_scaling_factor", "step3p7": "moe_router_scaling_factor"}
    sizes = {} if name == "openai_privacy_filter" else {key.get(name, "routed_scaling_factor"): 2.5}
    model = odd.build(**sizes)
    blocks = {}
    for path, module in model.named_modules():
        if hasattr(module, "experts"):
            module.register_forward_hook(
                lambda m, a, out, path=path: blocks.__setitem__(path, (a[0], out))
            )
    layers, _ = record(odd, model, batch_of(name), tmp_path / "run")
    for layer in layers:
        x, out = blocks[layer.info.path]
        y_TD = (out[0] if isinstance(out, tuple) else out).flatten(0, 1)
        if layer.info.shared_experts:
            with torch.no_grad():
                y_TD = y_TD - layer.block.shared_experts(x.flatten(0, 1))
        assert layer.info.output_scale == (2 if name == "openai_privacy_filter" else 2.5)
        assert relative(layer.info.output_scale * layer.experts_sum(), y_TD) < 1e-5


def test_deepseek_v4_in_bf16_has_a_margin_though_its_router_rounds(tmp_path):
    """Its scores are computed in bfloat16: near ties come out another way than in float32."""
    model = ODD["deepseek_v4"].build().bfloat16()
    meta, routing, _ = run(model, batch_of("deepseek_v4"), tmp_path / "run")
    assert meta.layers[1].selection == "sqrtsoftplus+bias"
    margin = routing[routing.layer == 1].margin
    assert margin.notna().all()
    assert (margin >= 0).all()
    assert (margin == 0).any()  # such a tie
