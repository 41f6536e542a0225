"""Families of transformers whose experts are reached in an odd way: captured equals executed.

Ids by ablation: an expert's output weights are set to zero, its block's experts run again on the
same input, and the tokens that change are those which the trace says it had. Weights by
reconstruction: the experts' sum, written out in plain arithmetic with the captured ids and weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.odd_models import ODD, batch_of, rebuilt, zeroed
from support.odd_recorded import record, relative, slots, tensors

import moe_lens
from moe_lens_hooks.adapters.nllb import OTHER as NLLB_NOTE


@pytest.mark.parametrize("name", ODD)
def test_ids_and_weights_are_those_that_were_executed(name, tmp_path):
    odd = ODD[name]
    layers, meta = record(odd, odd.build(), batch_of(name), tmp_path / "run")
    assert layers
    assert set(meta.warnings) <= {NLLB_NOTE}
    for layer in layers:
        ran = slots(layer.rows)
        assert len(ran) > 0
        whole = layer.experts_sum()
        for expert in range(layer.info.experts):
            with zeroed(odd.last(layer.block, expert)):
                changed = (layer.experts_sum() != whole).any(-1).tolist()
            assert changed == [any(e == expert and w > 0 for e, w in s) for s in ran]
        if layer.info.role == "attention":
            continue  # rebuilt in a test of its own
        with torch.no_grad():
            again = rebuilt(odd, layer.block, layer.x_TD, ran, weights_on=layer.info.weights_on)
        assert relative(again, whole) < 1e-6


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


SCORES = {
    "softmax": softmax,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    "logits": lambda z: z,
}

# How each router works, read from its source: score, what it selects by, and where its logits are.
GATE, ROUTER = ("gate", lambda out: out[0]), ("router", lambda out: out[0])
ROUTERS = {
    "beam": ("sigmoid", "sigmoid+bias, groups by top-2", *GATE),
    "dbrx": ("softmax", "logits", "router", lambda out: out),
    "deepseek_v4": ("sqrtsoftplus", "sqrtsoftplus+bias", *GATE),
    "diffusion_gemma": ("softmax", "logits", "router.proj", lambda out: out),
    "doge": ("softmax", "logits", "router_gate", lambda out: product_keys(out)),
    "ernie4_5_vl_moe": ("softmax", "softmax+bias", *GATE),
    "gemma4": ("softmax", "logits", "router.proj", lambda out: out),
    "inkling": ("sigmoid", "sigmoid+bias", *GATE),
    "jetmoe": ("softmax", "logits", "router", lambda out: out[4]),
    "laguna": ("sigmoid", "sigmoid+bias", *GATE),
    "llama4": ("sigmoid", "logits", "router", lambda out: out[1]),
    "llama4_top2": ("sigmoid", "logits", "router", lambda out: out[1]),
    "longcat_flash": ("softmax", "softmax+bias", *ROUTER),
    "minimax_m3_vl": ("sigmoid", "sigmoid+bias", *GATE),
    "nllb_moe": ("softmax", "logits", "router", lambda out: out[2]),
    "openai_privacy_filter": ("softmax", "logits", *ROUTER),
    "phimoe": ("softmax", "logits", *ROUTER),
    "step3p7": ("sigmoid", "sigmoid+bias", *GATE),
    "switch_transformers": ("softmax", "logits", "router", lambda out: out[2]),
    "zaya": ("softmax", "softmax+bias", *GATE),
}


def product_keys(keys):
    first, second = keys.reshape(2, -1, keys.shape[-1] // 2)
    return torch.stack([first[:, [i]] + second for i in range(first.shape[1])], 1).flatten(1)


@pytest.mark.parametrize("name", ROUTERS)
def test_entropy_margin_and_runner_up_are_those_of_float64(name, tmp_path):
    score, selection, path, pick = ROUTERS[name]
    odd = ODD[name]
    model = odd.build()
    seen = {}
    for at, block in model.named_modules():
        router = block.get_submodule(path) if _has(block, path) else None
        if router is not None:
            router.register_forward_hook(
                lambda m, a, out, at=at: seen.__setitem__(at, pick(out).double().numpy())
            )
    layers, _ = record(odd, model, batch_of(name), tmp_path / "run")
    checked = known = 0
    for layer in layers:
        if layer.info.router == "hash":
            continue
        assert (layer.info.score, layer.info.selection) == (score, selection)
        at = f"{layer.info.path}.experts" if layer.info.role == "attention" else layer.info.path
        z_TE = seen[at].reshape(len(layer.rows), -1)
        p_TE = SCORES[score](z_TE)
        p_TE = p_TE / p_TE.sum(-1, keepdims=True)
        rank_TE = ranked(selection, z_TE, bias_of(layer.block))
        for row, p, rank in zip(layer.rows.itertuples(), p_TE, rank_TE, strict=True):
            assert row.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=2**-7, abs=1e-6)
            chosen = row.router_ids if row.router_ids is not None else row.expert_ids
            order = np.argsort(-rank)
            k = len(chosen)
            if k == 0:  # NLLB routes no padding
                continue
            assert set(chosen) == set(order[:k])
            assert row.margin == pytest.approx(rank[order[k - 1]] - rank[order[k]], rel=2**-6)
            assert list(row.next_ids) == [order[k]]
            if row.next_weights is not None:
                known += 1
                weight = row.weights[0] * p[order[k]] / p[chosen[0]]
                assert row.next_weights[0] == pytest.approx(weight, rel=1e-4)
            checked += 1
    assert checked > 0
    # Gemma scales each expert, phimoe leaves far experts out of its softmax, and NLLB divides by
    # what it did not drop: the weight that a runner-up would have had is not known there.
    assert (known == checked) == (name not in {"gemma4", "diffusion_gemma", "phimoe", "nllb_moe"})


def _has(block, path):
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def bias_of(block):
    tensors = dict([*block.named_buffers(), *block.named_parameters()])
    wanted = [n for n in tensors if n.endswith(("correction_bias", "balancing_biases"))]
    return tensors[wanted[0]].double().numpy().reshape(-1) if wanted else None


def ranked(selection, z_TE, bias_E):
    """The selection score in float64, written out; -inf where a group is out of the running."""
    name, _, groups = selection.partition(", ")
    rank_TE = SCORES[name.removesuffix("+bias")](z_TE)
    if name.endswith("+bias"):
        rank_TE = rank_TE + bias_E
    if groups:  # four groups of two, the two best of which may be used
        for rank in rank_TE:
            best = np.argsort(-rank.reshape(4, 2).sum(1))[:2]
            rank[~np.isin(np.arange(8) // 2, best)] = -np.inf
    return rank_TE


@pytest.mark.parametrize("name", ODD)
def test_recording_changes_no_bit_of_the_output(name, tmp_path):
    model, batch = ODD[name].build(), batch_of(name)
    with torch.no_grad():
        before = next(iter(model(**batch).values()))
        hooks = hooks_of(model)  # transformers leaves some of its own after the first forward
        with moe_lens.record(model, tmp_path / "run", tokens=1.0, logits=True) as rec, rec.step():
            during = next(iter(model(**batch).values()))
    for a, b in zip(tensors(before), tensors(during), strict=True):
        assert torch.equal(a, b)
    assert hooks_of(model) == hooks


def hooks_of(model):
    return [(n, [*m._forward_hooks], [*m._forward_pre_hooks]) for n, m in model.named_modules()]


@pytest.mark.parametrize("name", ODD)
def test_training_is_the_same_with_recording_on(name, tmp_path):
    """The same losses and gradients from the same seed: nothing is changed, nothing is drawn."""

    def gradients(record):
        torch.manual_seed(3)
        model, batch = ODD[name].build().train(), batch_of(name)
        rec = moe_lens.record(model, tmp_path / "run", tokens=1.0) if record else None
        torch.manual_seed(4)
        out = tensors(tuple(model(**batch).values()))
        sum(x.float().square().mean() for x in out if x.requires_grad).backward()
        if rec is not None:
            rec.close()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recorded = gradients(False), gradients(True)
    assert len(plain) > 0
    for a, b in zip(plain, recorded, strict=True):
        assert torch.equal(a, b)
