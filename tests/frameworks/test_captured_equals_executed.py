"""Ids and weights in the trace are those that the experts consumed, and the model is untouched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.models import EXPERTS, FAMILIES, VOCAB, build, switch
from support.tables import read
from support.truth import ablated, spy

import moe_lens
from moe_lens.trace.reader import open_run


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def captured(run, layer):
    rows = read(run, "routing").to_pandas()
    rows = rows[rows.layer == layer].sort_values(["step", "forward", "token"])
    return np.stack(rows.expert_ids), np.stack(rows.weights), rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_ids_and_weights_equal_what_the_experts_consumed(family, experts, batch, tmp_path):
    model = build(family)
    model.set_experts_implementation(experts)
    run = tmp_path / "run"
    with torch.no_grad(), spy(model) as truth:
        with moe_lens.record(model, run, tokens=1.0, weights="exact") as rec, rec.step():
            model(**batch)
    layers = open_run(run).meta.layers
    assert len(truth) == len(layers)
    for info, (path, ids, weights) in zip(layers, truth, strict=True):
        assert path == f"{info.path}.experts"
        got_ids, got_weights, _ = captured(run, info.layer)
        assert (got_ids == ids.numpy()).all()
        assert got_weights.tobytes() == weights.float().numpy().tobytes()  # bit for bit


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_does_not_change_a_bit_of_the_output(family, batch, tmp_path):
    model = build(family)
    with torch.no_grad():
        before = model(**batch).logits
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, logits=True) as rec, rec.step():
            during = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_gradients_are_the_same_with_recording_on(batch, tmp_path):
    def gradients(record):
        model = build("qwen3_moe").train()
        if record:
            with moe_lens.record(model, tmp_path / "run", tokens=1.0) as rec, rec.step():
                model(**batch, labels=batch["input_ids"]).loss.backward()
        else:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablating_an_expert_changes_exactly_the_tokens_that_were_routed_to_it(
    family, batch, tmp_path
):
    model = build(family)

    def run():
        with torch.no_grad():
            model(**batch)

    trace = tmp_path / "run"
    with moe_lens.record(model, trace, tokens=1.0) as rec, rec.step():
        run()
    for info in open_run(trace).meta.layers:
        experts = model.get_submodule(f"{info.path}.experts")
        ids, _, _ = captured(trace, info.layer)
        whole = _whole(experts, run)
        for expert in range(EXPERTS):
            changed = (ablated(model, experts, expert, run) != whole).any(-1).numpy()
            assert (changed == (ids == expert).any(1)).all()


def _whole(experts, run):
    outputs = []
    handle = experts.register_forward_hook(lambda m, a, out: outputs.append(out.clone()))
    run()
    handle.remove()
    return torch.cat(outputs)


def test_deepseek_selection_is_not_topk_of_the_logits_and_is_named(batch, tmp_path):
    model = build("deepseek_v3")
    run = tmp_path / "run"
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, logits=True) as rec, rec.step():
        model(**batch)
    info = open_run(run).meta.layers[0]
    assert info.selection == "sigmoid+bias, groups by top-2"
    assert (info.score, info.selection_bias, info.block) == ("sigmoid", True, 1)
    ids, _, rows = captured(run, 0)
    logits = np.stack(read(run, "logits").to_pandas().query("layer == 0").logits)
    naive = np.argsort(-logits, axis=1)[:, :2]
    same = [set(a) == set(b) for a, b in zip(ids.tolist(), naive.tolist(), strict=True)]
    assert np.mean(same) < 0.9  # recomputing topk(logits) would be wrong here
    # margin and runner-up against the router's own arithmetic, in float64
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        for row, z in zip(rows.itertuples(), logits, strict=True):
            score = 1 / (1 + np.exp(-z.astype(np.float64)))
            score += router.e_score_correction_bias.double().numpy()
            group = np.sort(score.reshape(4, 2), axis=1).sum(1)
            allowed = np.argsort(-group)[:2]
            score[~np.isin(np.arange(8) // 2, allowed)] = -np.inf
            order = np.argsort(-score)
            assert set(row.expert_ids) == set(order[:2])
            assert row.next_ids == [order[2]]
            assert row.margin == pytest.approx(score[order[1]] - score[order[2]], abs=2e-2)


@pytest.mark.parametrize(
    ("family", "score", "selection"),
    [
        ("mixtral", "softmax", "logits"),
        ("qwen3_moe", "softmax", "logits"),
        ("olmoe", "softmax", "logits"),
        ("gpt_oss", "softmax", "logits"),
    ],
)
def test_entropy_margin_and_runner_up_equal_a_naive_loop(family, score, selection, batch, tmp_path):
    model = build(family)
    run = tmp_path / "run"
    block = model.model.layers[1].mlp
    gate, seen = getattr(block, "gate", None) or block.router, []
    handle = gate.register_forward_hook(lambda m, a, out: seen.append(out[0].double().numpy()))
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        with rec.step():
            model(**batch)
    handle.remove()
    info = open_run(run).meta.layers[1]
    assert (info.score, info.selection) == (score, selection)
    _, _, rows = captured(run, 1)
    for row, z in zip(rows.itertuples(), seen[0], strict=True):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        order = np.argsort(-z)
        assert set(row.expert_ids) == set(order[:2])
        assert row.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=2**-8)
        assert row.margin == pytest.approx(z[order[1]] - z[order[2]], rel=2**-7, abs=1e-5)
        assert list(row.next_ids) == [order[2]]
        expected = row.weights[0] * p[order[2]] / p[row.expert_ids[0]]
        assert row.next_weights[0] == pytest.approx(expected, rel=1e-4)


def test_counts_equal_a_naive_loop_over_the_spied_ids(batch, tmp_path):
    model = build("mixtral")
    run = tmp_path / "run"
    tags = ["code", "prose", "code"]
    with torch.no_grad(), spy(model) as truth, moe_lens.record(model, run, tokens=0.0) as rec:
        for _ in range(2):
            with rec.step(tags=tags):
                model(**batch)
    valid = batch["attention_mask"].flatten().bool().tolist()
    naive = {}
    for call, (_, ids, weights) in enumerate(truth):
        layer = call % 3
        for t, (token_ids, token_weights) in enumerate(
            zip(ids.tolist(), weights.tolist(), strict=True)
        ):
            tag = tags[t // 12]
            for e, w in zip(token_ids, token_weights, strict=True):
                cell = naive.setdefault((layer, tag, e), [0, 0, 0.0])
                if valid[t]:
                    cell[0] += 1
                    cell[2] += w
                else:
                    cell[1] += 1
    load = read(run, "load").to_pandas()
    got = load.groupby(["layer", "tag", "expert"])[["routed", "padding", "weight_sum"]].sum()
    got = got[(got.routed > 0) | (got.padding > 0)]
    assert set(got.index) == set(naive)
    for key, (routed, padding, weight) in naive.items():
        assert got.loc[key, "routed"] == routed
        assert got.loc[key, "padding"] == padding
        assert got.loc[key, "weight_sum"] == pytest.approx(weight, rel=1e-3)
    assert (load.processed == load.routed).all()
    assert read(run, "routing").num_rows == 0


def test_switch_drops_are_those_of_a_naive_count(tmp_path):
    model = switch(capacity=3)
    torch.manual_seed(2)
    batch = {
        "input_ids": torch.randint(1, VOCAB, (2, 16)),
        "decoder_input_ids": torch.randint(1, VOCAB, (2, 9)),
    }
    run = tmp_path / "run"
    routers = [m for m in model.modules() if type(m).__name__ == "SwitchTransformersTop1Router"]
    seen = []
    handles = [r.register_forward_hook(lambda m, a, out: seen.append(out)) for r in routers]
    with torch.no_grad(), moe_lens.record(model, run, tokens=1.0, weights="exact") as rec:
        with rec.step():
            model(**batch)
    for handle in handles:
        handle.remove()
    infos = open_run(run).meta.layers
    assert [i.stream for i in infos] == ["encoder", "encoder", "decoder", "decoder"]
    load = read(run, "load").to_pandas()
    total_dropped = 0
    for info, (mask, prob, logits) in zip(infos, seen, strict=True):
        ids, weights, rows = captured(run, info.layer)
        assert (weights[:, 0] == prob.flatten().numpy()).all()
        taken = {}
        dropped = []
        for t, z in enumerate(logits.reshape(-1, EXPERTS).tolist()):
            wanted = max(range(EXPERTS), key=z.__getitem__)
            sequence = t // logits.shape[1]
            taken[sequence, wanted] = taken.get((sequence, wanted), 0) + 1
            dropped.append(taken[sequence, wanted] > 3)
            assert ids[t, 0] == wanted
            assert mask.reshape(-1, EXPERTS)[t].sum() == (not dropped[-1])
        assert [list(d) if d is not None else None for d in rows.dropped] == [
            [0] if d else None for d in dropped
        ]
        mine = load[load.layer == info.layer]
        assert mine.dropped.sum() == mine.overflowed.sum() == sum(dropped)
        assert mine.routed.sum() == len(dropped)
        total_dropped += sum(dropped)
    assert total_dropped > 0
    routers_table = read(run, "routers").to_pandas()
    assert routers_table.unserved_tokens.sum() == total_dropped
    tokens = read(run, "tokens").to_pandas()
    assert tokens.groupby("stream").size().to_dict() == {"encoder": 32, "decoder": 18}


def test_zloss_and_top1_sums_equal_float64(batch, tmp_path):
    model = build("olmoe")
    run = tmp_path / "run"
    logits = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda m, a, out: logits.append(out[0].double()))
    with torch.no_grad(), moe_lens.record(model, run, tokens=0) as rec, rec.step():
        model(**batch)
    handle.remove()
    z = logits[0][batch["attention_mask"].flatten().bool()].numpy()
    lse = np.log(np.exp(z).sum(1))
    p = np.exp(z - lse[:, None])
    row = read(run, "routers").to_pandas().query("layer == 0").iloc[0]
    assert row.zloss_sum == pytest.approx((lse**2).sum(), rel=1e-5)
    assert row.top1_prob_sum == pytest.approx(p.max(1).sum(), rel=1e-5)
    assert row.entropy_sum == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert row.entropy_sum / row.tokens <= math.log(EXPERTS)
