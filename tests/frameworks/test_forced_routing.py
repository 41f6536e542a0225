"""Forcing what was captured reproduces a model bit for bit: for every architecture of transformers.

And forcing other ids makes the experts get exactly those, which a replay of that run repeats: what
a router would have chosen by itself has no part in it.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.models import FAMILIES, VOCAB
from support.models import build as build_family
from support.tables import read
from support.truth import spy
from support.zoo import ZOO, batch, build

import moe_lens
from moe_lens.trace.reader import open_run

NO_CHOICE = {"vitpose_backbone": "the caller names the expert"}
"""Nothing can be forced, and a replay checks that the experts are the recorded ones."""

REFUSED: dict[str, str] = {}
"""Architectures whose ids cannot be forced inside the router, and why."""

NO_PLAIN_WEIGHTS = {
    "doge": "experts are looked up in embeddings, weights are a local variable of the block",
    "jetmoe": "tokens are sorted by expert",
    "llama4": "scores multiply the experts' input",
    "llama4_top2": "scores multiply the experts' input",
    "nllb_moe": "experts get masks",
    "switch_transformers": "experts get masks",
    "vitpose_backbone": "the caller names the expert, whose weight is 1",
    "zaya": "a skipped choice is rewritten to expert 0",
}
"""Architectures whose experts cannot be given recorded weights, and why."""


def tensors(x):
    """All tensors of a model's output."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
    return [t for part in parts for t in tensors(part)]


def run_of(model, entry):
    with torch.no_grad():
        return tensors(model(**copy.deepcopy(batch(entry))))  # one batch holds a cache


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("name", [n for n in ZOO if n not in REFUSED])
def test_forcing_what_was_captured_reproduces_the_output_bit_for_bit(name, tmp_path):
    model, trace = build(ZOO[name]), tmp_path / "run"
    run_of(model, ZOO[name])  # libraries attach hooks of their own in a first forward
    before = hooks(model)
    with moe_lens.record(model, trace, tokens=1.0, weights="exact") as rec, rec.step():
        captured = run_of(model, ZOO[name])
    for by in ("forward", "position"):
        with moe_lens.force_routing(model, trace, by=by) as forced:
            assert same(run_of(model, ZOO[name]), captured)
        assert (forced.forwards, forced.own_tokens) == (1, 0)
        tokens = read(trace, "tokens").to_pandas()
        assert forced.forced_tokens == (~tokens.padding | (by == "forward")).sum()
    with moe_lens.force_routing(model, trace, weights="recorded"):
        if name in NO_PLAIN_WEIGHTS:
            with pytest.raises(moe_lens.UnsupportedRouter, match="not called with plain ids"):
                run_of(model, ZOO[name])
        else:
            assert same(run_of(model, ZOO[name]), captured)
    assert hooks(model) == before


@pytest.mark.parametrize("name", [n for n in ZOO if n not in (*REFUSED, *NO_CHOICE)])
def test_other_ids_reach_the_experts_and_a_replay_of_that_repeats_it(name, tmp_path):
    model, entry = build(ZOO[name]), ZOO[name]
    with moe_lens.record(model, tmp_path / "free", tokens=1.0) as rec, rec.step():
        free = run_of(model, entry)
    rows = read(tmp_path / "free", "routing").to_pandas().groupby("layer").size()
    generator = torch.Generator().manual_seed(7)
    ids = {
        x.layer: torch.rand(rows[x.layer], x.experts + x.zero_experts, generator=generator)
        .argsort(-1)[:, : x.top_k or 2]
        .contiguous()
        for x in open_run(tmp_path / "free").meta.layers
        if x.router not in ("hash", "task")
    }
    record = moe_lens.record(model, tmp_path / "told", tokens=1.0, weights="exact")
    with record as rec, moe_lens.force_routing(model, ids), rec.step():
        told = run_of(model, entry)
    with moe_lens.force_routing(model, tmp_path / "told"):  # the other order of hooks
        with moe_lens.record(model, tmp_path / "again", tokens=1.0, weights="exact") as rec:
            with rec.step():
                assert same(run_of(model, entry), told)
    assert not same(told, free)
    assert all(t.isfinite().all() for t in told if t.is_floating_point())
    assert same(run_of(model, entry), free)
    for trace in ("told", "again"):
        got = read(tmp_path / trace, "routing").to_pandas().sort_values(["layer", "token"])
        got["choice"] = got.router_ids.where(got.router_ids.notna(), got.expert_ids)
        for layer, wanted in ids.items():
            choices = got[got.layer == layer].choice
            for choice, row in zip(choices, wanted.tolist(), strict=True):
                assert list(choice) in (row, row[: len(choice)])  # NLLB: none for padding


def test_nearly_all_architectures_can_be_forced():
    assert len(ZOO) - len(REFUSED) >= 65
    assert set(NO_PLAIN_WEIGHTS) | set(NO_CHOICE) | set(REFUSED) <= set(ZOO)


def test_random_draws_of_a_router_that_is_training_are_refused(tmp_path):
    model, entry = build(ZOO["phimoe"]), ZOO["phimoe"]
    with moe_lens.record(model, tmp_path / "run", tokens=1.0):
        run_of(model, entry)
    model.train()
    with moe_lens.force_routing(model, tmp_path / "run"):
        with pytest.raises(moe_lens.UnsupportedRouter, match=r"at random: call model.eval\(\)"):
            run_of(model, entry)


def test_tokens_of_other_kinds_are_refused_where_a_layer_sees_some(tmp_path):
    model, inputs = build(ZOO["ernie4_5_vl_moe"]), batch(ZOO["ernie4_5_vl_moe"])
    with torch.no_grad(), moe_lens.record(model, tmp_path / "run", tokens=1.0):
        model(**inputs)
    kinds = inputs["moe_mm_token_type_ids"]
    inputs["moe_mm_token_type_ids"] = kinds.roll(1, 1)  # as many text and vision tokens
    with torch.no_grad(), moe_lens.force_routing(model, tmp_path / "run"):
        with pytest.raises(moe_lens.SteeringError, match="of the tokens, which are not the"):
            model(**inputs)


# -- what the output is then ---------------------------------------------------------------------


def mixture(block, family, x_TD, ids_TK):
    """The block's output for these ids, from the paper's formulas of the gate weights."""
    router = block.gate if hasattr(block, "gate") else block.router
    logits = x_TD @ router.weight.T
    if family == "gpt_oss":
        weights = (logits + router.bias).gather(1, ids_TK).softmax(-1)
    elif family == "deepseek_v3":
        weights = logits.sigmoid().gather(1, ids_TK)
        weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
    else:
        weights = logits.softmax(-1).gather(1, ids_TK)
        if family == "deepseek_v2_groups":
            weights = weights * router.routed_scaling_factor
        elif family != "olmoe":
            weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x_TD)
    for slot in range(ids_TK.shape[1]):  # one expert of each token at a time, with weight 1
        one = block.experts(x_TD, ids_TK[:, slot : slot + 1], torch.ones(len(x_TD), 1))
        out += weights[:, slot : slot + 1] * one
    return out + block.shared_experts(x_TD) if hasattr(block, "shared_experts") else out


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2_groups"])
def test_other_ids_change_the_output_as_the_formula_says(family):
    # DeepSeek-V2 masks experts outside of its best group out: a forced one keeps its probability
    model = build(ZOO[family]) if family in ZOO and "groups" in family else build_family(family)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    blocks = [m for m in model.modules() if hasattr(m, "experts")]
    ids = torch.rand(len(blocks), 18, 8, generator=torch.Generator().manual_seed(1)).argsort(-1)
    seen = []
    watched = [
        b.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out))) for b in blocks
    ]
    with torch.no_grad():
        with moe_lens.force_routing(model, ids[..., :2]):
            model(input_ids=tokens)
        [h.remove() for h in watched]
        assert [m for m, _, _ in seen] == blocks
        for layer, (block, x, out) in enumerate(seen):
            got = out[0] if isinstance(out, tuple) else out
            expected = mixture(block, family, x.reshape(18, -1), ids[layer, :, :2])
            torch.testing.assert_close(got.reshape(18, -1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("setting", ["bfloat16", "autocast", "inference_mode"])
def test_the_same_under_other_settings(experts, setting, tmp_path):
    model = build_family("qwen3_moe")
    model.set_experts_implementation(experts)
    if setting == "bfloat16":
        model = model.bfloat16()
    context = torch.inference_mode() if setting == "inference_mode" else torch.no_grad()
    tokens = torch.randint(0, VOCAB, (2, 9))
    with context, torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact") as rec:
            captured = model(input_ids=tokens).logits
        for weights in ("router", "recorded"):
            with moe_lens.force_routing(model, tmp_path / "run", weights=weights):
                assert torch.equal(model(input_ids=tokens).logits, captured)
    assert rec.path.exists()


def test_recorded_weights_replace_what_the_routers_say(tmp_path):
    """With its routers changed at random, the model still computes what it did."""
    model = build_family("mixtral")
    tokens = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, weights="exact"):
            captured = model(input_ids=tokens).logits
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_()
        with moe_lens.force_routing(model, tmp_path / "run", weights="recorded"):
            with spy(model) as calls:
                assert torch.equal(model(input_ids=tokens).logits, captured)
        with moe_lens.force_routing(model, tmp_path / "run"):
            with spy(model) as inside:
                assert not torch.equal(model(input_ids=tokens).logits, captured)
    rows = read(tmp_path / "run", "routing").to_pandas()
    for layer, (given, chosen) in enumerate(zip(calls, inside, strict=True)):
        mine = rows[rows.layer == layer].sort_values("token")
        assert (np.stack(mine.expert_ids) == given[1].numpy()).all()
        assert (np.stack(mine.expert_ids) == chosen[1].numpy()).all()
        assert np.stack(mine.weights).tobytes() == given[2].numpy().tobytes()
        assert not np.allclose(np.stack(mine.weights), chosen[2].numpy())
