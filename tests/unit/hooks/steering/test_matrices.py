"""Which weights a router and experts have: by the sizes of their configs, or refused by name."""

from __future__ import annotations

import pytest
import torch
from support.inline_models import build as build_inline
from support.models import FAMILIES, TinyModel, build, switch
from support.zoo import ZOO
from support.zoo import build as build_zoo
from torch import nn

from moe_lens.errors import UnsupportedRouter
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.finding import find_layers
from moe_lens_hooks.steering.matrices import weights_of
from moe_lens_hooks.steering.rounding import RoundedLayer

D, F, E = 64, 48, 8


def layers_of(model):
    return find_layers([model], all_adapters())


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_outputs_by_inputs(family):
    """A gate and an up product of each expert, stacked, and the way back."""
    for layer in layers_of(build(family)):
        ((_, router),) = weights_of(layer, "router")[0].matrices()
        assert router.shape == (E, D)
        found = [x for w in weights_of(layer, "experts") for x in w.matrices()]
        shapes = {e: {tuple(m.shape) for of, m in found if of == e} for e in range(E)}
        assert shapes == {e: {(2 * F, D), (D, F)} for e in range(E)}
        inside = {p.data_ptr() for p in layer.block.parameters()}
        assert router.data_ptr() in inside  # views, not copies


@pytest.mark.parametrize(
    ("name", "router", "experts"),
    [
        ("llama4", (E, D), {(2 * F, D), (D, F)}),  # not said by the module, told by its sizes
        ("jetmoe", (E, D), {(2 * F, D), (D, F)}),  # parameters named `weight`: by their module
        ("longcat_flash", (E + 4, D), {(2 * F, D), (D, F)}),  # zero experts
        ("ernie4_5_moe", (E, D), {(2 * F, D), (D, F)}),  # with a bias [1, E] in its router
        ("zaya", (E + 1, D // 2), {(2 * F, D), (D, F)}),  # of several products the last
        ("nemotron_h", (E, D), {(F, D // 2), (D // 2, F)}),  # experts narrower than the model
    ],
)
def test_odd_families(name, router, experts):
    layer = layers_of(build_zoo(ZOO[name]))[-1]
    if name == "jetmoe":  # attention experts come first in each block
        layer = next(x for x in layers_of(build_zoo(ZOO[name])) if x.info.path.endswith("mlp"))
    ((_, matrix),) = weights_of(layer, "router")[0].matrices()
    assert matrix.shape == router
    found = [x for w in weights_of(layer, "experts") for x in w.matrices()]
    assert {tuple(m.shape) for _, m in found} == experts


def test_lists_of_experts():
    layer = layers_of(build_inline("softmax_topk"))[0]
    found = weights_of(layer, "experts")
    assert len(found) == 6 * 3
    assert {w.expert for w in found} == set(range(6))
    for w in found:
        module = layer.block.experts[w.expert]
        assert any(w.parameter is p for p in (module.w1.weight, module.w2.weight, module.w3.weight))
    of_switch = weights_of(layers_of(switch())[0], "experts")
    assert len(of_switch) == 8 * 2


def test_tied_weights_are_rounded_once():
    layer = layers_of(build_inline("softmax_topk"))[0]
    for expert in layer.block.experts:
        expert.w3.weight = expert.w1.weight
    assert len(weights_of(layer, "experts")) == 18
    found = RoundedLayer(weights_of(layer, "router"), weights_of(layer, "experts"))
    assert [len(found.of(p)) for p in ("router", "experts", "both")] == [1, 12, 13]


@pytest.mark.parametrize(
    ("name", "part", "why"),
    [
        ("dbrx", "experts", "neither stacked in parameters"),
        ("doge", "experts", "neither stacked in parameters"),
        ("doge", "router", "no single matrix of its router"),
        ("inkling", "router", "no single matrix of its router"),
        ("deepseek_v4", "router", "no single matrix of its router"),
        ("vitpose_backbone", "router", "no single matrix of its router"),
    ],
)
def test_families_whose_weights_are_not_told(name, part, why):
    layer = layers_of(build_zoo(ZOO[name]))[0]
    with pytest.raises(UnsupportedRouter, match=why) as error:
        weights_of(layer, part)
    assert str(error.value).startswith(layer.info.path)


@pytest.mark.parametrize(
    ("names", "transposed"),
    [
        (("gate_up_proj", "down_proj"), False),
        (("w1", "w2"), False),
        (("first", "second"), None),  # either could be the way back
        (("down_proj", "gate_up_proj"), True),  # the way back is [experts, inputs, outputs] then
    ],
)
def test_sizes_tell_the_inputs_only_where_a_name_tells_the_way_back(names, transposed):
    layer = layers_of(build("mixtral"))[0]
    experts = layer.block.experts
    experts.is_transposed = None
    stacks = [experts.gate_up_proj, experts.down_proj]
    del experts.gate_up_proj, experts.down_proj
    for name, p in zip(names, stacks, strict=True):
        experts.register_parameter(name, p)
    if transposed is None:
        with pytest.raises(UnsupportedRouter, match="is the input is not to be seen"):
            weights_of(layer, "experts")
    else:
        assert {w.transposed for w in weights_of(layer, "experts")} == {transposed}


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda m: m.to("meta"), "meta device"),
        (lambda m: m.requires_grad_(False).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda m: nn.utils.parametrizations.weight_norm(m), "no parameter of its own"),
    ],
)
def test_weights_that_are_not_plain(spoil, why):
    model = build_inline("softmax_topk", blocks=1)
    layer = layers_of(model)[0]
    for expert in layer.block.experts:
        spoil(expert.w1)
    with pytest.raises(UnsupportedRouter, match=why):
        weights_of(layer, "experts")


class Wrapped(torch.Tensor):
    """As torchao and DTensor do it: a class of its own, of floats by its type."""


def test_weights_of_another_class():
    model = TinyModel()
    layer = layers_of(model)[0]
    own = layer.block.gate.weight.detach()
    layer.block.gate.weight = nn.Parameter(own.as_subclass(Wrapped))
    with pytest.raises(UnsupportedRouter, match="in a Wrapped: quantised already"):
        weights_of(layer, "router")
