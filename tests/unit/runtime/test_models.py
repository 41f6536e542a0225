"""The layer with a model's own weights and routing gives what the model's MoE block gives."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GptOssConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_lens.errors import RuntimeInputError
from moe_lens.runtime.checks import check_ids
from moe_lens.runtime.layer import MoELayer

COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **COMMON),
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=3,
            head_dim=32,
            norm_topk_prob=True,
            **COMMON,
        ),
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig(intermediate_size=40, num_experts=16, num_experts_per_tok=4, **COMMON),
    ),
}


def seen_in(model, ids):
    """For each MoE block: its experts module, what that was given, and what both gave."""
    seen, handles = [], []
    for block in (b for b in model.modules() if hasattr(b, "experts")):
        entry = {"experts": block.experts}
        seen.append(entry)

        def given(module, inputs, entry=entry):
            entry["given"] = [t.detach().clone() for t in inputs]

        def gave(module, inputs, output, entry=entry, name="experts_out"):
            output = output[0] if isinstance(output, tuple) else output
            entry[name] = output.detach().clone()

        def block_gave(module, inputs, output, gave=gave):
            gave(module, inputs, output, name="block_out")

        handles.append(block.experts.register_forward_pre_hook(given))
        handles.append(block.experts.register_forward_hook(gave))
        handles.append(block.register_forward_hook(block_gave))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("experts_implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_block(family, dtype, close, experts_implementation, backend):
    make, config = FAMILIES[family]
    config._experts_implementation = experts_implementation
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():  # as they come, outputs are too small for bf16 to matter
        parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    model = model.to(dtype)
    blocks = seen_in(model, torch.randint(64, (2, 24)))
    assert len(blocks) == 2
    for block in blocks:
        layer = MoELayer.from_experts(block["experts"], backend=backend)
        x, ids, weights = block["given"]
        check_ids(ids.int(), layer.experts)
        y = layer(x, ids.int(), weights)
        assert y.dtype == dtype
        assert error(y, block["experts_out"]) < close
        assert error(y, block["block_out"].reshape(y.shape)) < close


def test_the_weights_are_the_models_own():
    experts = FAMILIES["mixtral"][0](FAMILIES["mixtral"][1]).model.layers[0].mlp.experts
    layer = MoELayer.from_experts(experts)
    assert layer._gate_up.data_ptr() == experts.gate_up_proj.data_ptr()
    assert layer._down.data_ptr() == experts.down_proj.data_ptr()
    assert (layer.experts, layer.hidden, layer.intermediate) == (4, 64, 48)
    assert not layer._gate_up.requires_grad


def mixtral(**more):
    config = MixtralConfig(
        intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **COMMON, **more
    )
    return MixtralExperts(config)


class OwnGate(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=7)) * up


def changed(**attributes):
    module = mixtral()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GptOssExperts(GptOssConfig(**COMMON)), "GptOssExperts has biases .*proj_bias"),
        (lambda: mixtral(hidden_act="gelu"), "MixtralExperts uses the activation GELU"),
        (lambda: changed(is_transposed=True), "transposed"),
        (lambda: changed(is_concatenated=False), "interleaves gate and up"),
        (lambda: changed(has_gate=False), "has no gate"),
        (lambda: changed(has_post_expert_norm=True), "normalises"),
        (lambda: changed(_is_expert_parallel=True), "only a part"),
        (lambda: OwnGate(mixtral().config), "OwnGate has a gate of its own .OwnGate._apply_gate."),
        (lambda: torch.nn.ModuleList(), "ModuleList has no tensor gate_up_proj"),
        (
            lambda: changed(down_proj=torch.nn.Parameter(torch.zeros(4, 48, 64))),
            r"MixtralExperts has weights gate_up \[4, 96, 64\] and down \[4, 48, 64\]",
        ),
    ],
)
def test_other_modules_are_refused_by_name(make, said):
    with pytest.raises(RuntimeInputError, match=said):
        MoELayer.from_experts(make())
