"""Architectures of transformers: their weights rounded, layer by layer and whole."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from support.zoo import ZOO, batch, build

import moe_lens

NAMES = (
    "aria",  # transposed stacks, said
    "llama4_top2",  # transposed stacks, not said; the weight on the experts' input
    "jetmoe",  # attention experts; stacks in modules of their own
    "longcat_flash",  # zero experts
    "zaya",  # a router of several products, and a class for none
    "muse_spark",  # experts narrower than the model
    "gemma4",  # logits inside of the router
    "deepseek_v2_groups",
    "deepseek_v4",  # hash-routed layers
    "ernie4_5_moe",  # a bias of its own beside the router
    "phimoe",  # one expert chosen after the other
    "granitemoeshared",
    "dbrx",
    "inkling",
    "doge",
)
"""One of each way in which routers and experts hold their weights."""

PARTS = {"dbrx": ("router",), "inkling": ("experts",), "doge": ()}
"""What is told of the weights, where not all is."""


def of_each_token(model, inputs):
    """A number for each token, of whatever the model returns."""
    found = outputs(model(**copy.deepcopy(inputs)))
    first = next(t for t in found if t.is_floating_point() and t.ndim == 3)
    return first.float().square().mean(-1)


def outputs(x):
    """All tensors of a model's output."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [t for part in parts for t in outputs(part)]


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_rounded_and_left_as_it_was(name, tmp_path):
    model = build(ZOO[name])
    inputs = batch(ZOO[name])
    with torch.no_grad(), moe_lens.record(model, tmp_path):
        model(**copy.deepcopy(inputs))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parts = PARTS.get(name, ("both",))
    options = {"loss": of_each_token, "formats": ["int3"], "parts": parts or ("both",)}
    if not parts:
        with pytest.raises(moe_lens.UnsupportedRouter, match="cannot be quantised"):
            moe_lens.precision(model, [inputs], tmp_path, **options)
        return
    found = moe_lens.precision(model, [inputs], tmp_path, **options)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    rows = pd.DataFrame(found.columns())
    whole = rows[rows["mode"].isin(["free", "forced"])]
    assert (whole.loss != whole.base_loss).any()
    assert set(found.about["refused"]) <= {"model.layers.0.mlp"}  # hash-routed (DeepSeek-V4)
    if parts != ("experts",):
        alone = rows[rows["mode"] == "alone"]
        assert alone.agreement.dropna().between(0, 1).all()
        assert 0 < (alone.agreement < 1).mean() < 1
