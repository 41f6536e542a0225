"""What tests of blocks that nobody described share: the arithmetic of each kind, done apart."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from support.inline_models import (
    D,
    E,
    K,
    SoftmaxTopk,
)
from support.tables import frame
from torch import nn

import moe_lens


def captured(run, layer, step=0):
    rows = frame(run, "routing").query("layer == @layer and step == @step").sort_values("token")
    return np.stack(rows.expert_ids), np.stack(rows.weights)


def record(model, run, *inputs, steps=1, **options):
    """Record steps; the model's output in the last."""
    with torch.no_grad():
        with moe_lens.record(model, run, tokens=1.0, weights="exact", **options) as rec:
            for _ in range(steps):
                with rec.step():
                    out = model(*inputs)
    return out


def inputs_of(model, ids):
    """What each block is given, with nothing attached but a plain hook."""
    seen = []
    handles = [
        b.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        for b in model.blocks
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [x.reshape(-1, D).double().numpy() for x in seen]


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def arithmetic(kind, block, x):
    """(ids, weights) in float64 numpy, from the block's parameters alone."""

    def w(name):
        return block.get_parameter(name).detach().double().numpy()

    gates = {"sorted": "router", "aria": "router", "dbrx": "router.layer", "top1": "switch"}
    gates |= {"dense_scores": "router", "input_weighted": "router", "every_expert": "wg"}
    gates |= {"noisy_tutorial": "router.topk_linear", "unweighted": "switch"}
    gate = gates.get(kind, "gate")
    z = x @ (w("w_gate") if kind == "raw_gate" else w(f"{gate}.weight").T)
    names = dict(block.named_parameters())
    if f"{gate}.bias" in names:
        z = z + w(f"{gate}.bias")
    order = np.argsort(-z, kind="stable")[:, :K]
    p, top = softmax(z), np.take_along_axis(z, order, 1)
    if kind == "unnormalised":
        return order, np.take_along_axis(p, order, 1)
    if kind == "input_weighted":
        return order, 1 / (1 + np.exp(-top))
    if kind in ("top1", "unweighted"):
        first = order[:, :1]
        return first, np.take_along_axis(p, first, 1) if kind == "top1" else np.ones(first.shape)
    if kind == "deepseek":
        s = 1 / (1 + np.exp(-z))
        ranked = s + block.gate.e_score_correction_bias.double().numpy()
        best = np.sort(ranked.reshape(-1, 3, 2), axis=2).sum(2)
        groups = np.argsort(-best)[:, :2]
        for t in range(len(x)):
            ranked[t, [e for e in range(E) if e // 2 not in groups[t]]] = -np.inf
        order = np.argsort(-ranked)[:, :K]
        chosen = np.take_along_axis(s, order, 1)
        return order, 2.5 * chosen / chosen.sum(1, keepdims=True)
    if kind == "sparsemixer":
        rest = z.copy()
        np.put_along_axis(rest, order[:, :1], -np.inf, 1)
        weights = []
        for slot, scores in enumerate((z, rest)):
            best = top[:, slot : slot + 1]
            far = (best - z) / np.maximum(np.abs(z), best) > 0.02
            masked = softmax(np.where(far, -np.inf, scores))
            weights.append(np.take_along_axis(masked, order[:, slot : slot + 1], 1))
        return order, np.concatenate(weights, 1)
    if kind == "in_place":
        return order, 2.5 * softmax(top)
    return order, softmax(top)  # normalised after a softmax over all is the same


def sets_agree(got, want):
    """Slots may come in another order: sort both by expert."""
    at, to = np.argsort(got[0]), np.argsort(want[0])
    same = (np.take_along_axis(got[0], at, 1) == np.take_along_axis(want[0], to, 1)).all()
    w = np.take_along_axis(got[1], at, 1), np.take_along_axis(want[1], to, 1)
    np.testing.assert_allclose(*w, rtol=2e-6, atol=1e-7)
    return same


class Stateful(SoftmaxTopk):
    """Everything that a forward may leave behind, and every source of chance."""

    def __init__(self):
        super().__init__()
        self.jitter = 0.3
        self.norm = nn.BatchNorm1d(D)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("load", torch.zeros(E))
        self.history, self.last, self.calls = [], None, {"n": 0}

    def route(self, logits):
        logits = logits + torch.rand_like(logits) * random.random() + np.random.rand()  # noqa: NPY002
        weights, ids = super().route(logits)
        with torch.no_grad():
            self.load += F.one_hot(ids, E).sum((0, 1))
        self.history.append(ids)
        self.calls["n"] += 1
        self.last = logits
        return weights, ids

    def forward(self, x):
        x *= torch.rand_like(x)
        y, logits = super().forward(self.norm(x.flatten(0, 1)).view_as(x))
        self.output = y.detach()
        return self.drop(y), logits
