"""Presets are what transformers' configurations say, where their defaults are that model."""

from __future__ import annotations

import pytest
import transformers as tf

from moe_lens.errors import ReplayError
from moe_lens.replay.presets import PRESETS, preset

DEFAULTS = {
    "mixtral-8x7b": (
        tf.MixtralConfig,
        ("hidden_size", "intermediate_size", "num_local_experts"),
        lambda c: c.num_hidden_layers,
    ),
    "qwen3-30b-a3b": (
        tf.Qwen3MoeConfig,
        ("hidden_size", "moe_intermediate_size", "num_experts"),
        None,
    ),
    "deepseek-v3": (
        tf.DeepseekV3Config,
        ("hidden_size", "moe_intermediate_size", "n_routed_experts"),
        lambda c: c.num_hidden_layers - c.first_k_dense_replace,
    ),
    "gpt-oss-120b": (
        tf.GptOssConfig,
        ("hidden_size", "intermediate_size", "num_local_experts"),
        lambda c: c.num_hidden_layers,
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_transformers(name: str) -> None:
    kind, sizes, layers = DEFAULTS[name]
    config, found = kind(), PRESETS[name]
    assert [getattr(config, size) for size in sizes] == [
        found.hidden,
        found.intermediate,
        found.experts,
    ]
    assert config.num_experts_per_tok == found.top_k
    if layers is not None:
        assert layers(config) == found.layers


def test_the_sizes_add_up_to_the_published_parameters() -> None:
    # Parameters of routed experts, in billions; the rest of each model is attention and embedding.
    published = {
        "mixtral-8x7b": 46.7,
        "olmoe-1b-7b": 6.9,
        "qwen3-30b-a3b": 30.5,
        "deepseek-v3": 671,
        "gpt-oss-20b": 20.9,
        "gpt-oss-120b": 116.8,
        "gemma-4-26b-a4b": 25.2,
    }
    assert published.keys() == PRESETS.keys()
    for name, total in published.items():
        p = PRESETS[name]
        experts = 3 * p.layers * p.experts * p.hidden * p.intermediate / 1e9
        assert 0.85 * total < experts < total, name
        assert p.source


def test_names_in_any_case_and_unknown_ones() -> None:
    assert preset("Mixtral-8x7B") is PRESETS["mixtral-8x7b"]
    with pytest.raises(ReplayError, match=r"no preset 'xyz'\. There are: mixtral-8x7b, olmoe"):
        preset("xyz")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("OLMoE", "olmoe-1b-7b"), ("olmoe-1b7b", "olmoe-1b-7b"), ("qwen3", "qwen3-30b-a3b"),
     ("deepseek-v2", "deepseek-v3"), ("mixtral8x7b", "mixtral-8x7b")],
)  # fmt: skip
def test_a_name_that_is_nearly_one(asked: str, meant: str) -> None:
    with pytest.raises(ReplayError, match=rf"Did you mean {meant}\? There are: "):
        preset(asked)
