"""Every MoE architecture of transformers: a class, and the sizes it needs beside the common ones.

A package stands here once for each kind of router it can build. Multimodal packages stand with
their text backbone, and with their vision experts where those are experts of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One configuration: `transformers.models.<package>.modeling_<package>.<model>`."""

    name: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)
    """Config fields beside, or instead of, those of `build.COMMON`."""
    package: str = ""
    """Empty: the name is the package's."""
    inputs: str = "text"
    """Which batch it takes; see `build.batch`."""

    @property
    def home(self) -> str:
        return self.package or self.name


_FULL_AND_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_GEMMA = {
    "global_head_dim": 16,
    "num_global_key_value_heads": 4,
    "layer_types": ["full_attention"] * 2,
}
_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 8,
    "rel_extent": 16,
}
_GROUPS_BY_BEST = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
_CAPACITY = {"num_experts": 4, "expert_capacity": 3}
_QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

_ALL = [
    Architecture("afmoe", "AfmoeForCausalLM"),
    Architecture("aria", "AriaTextForCausalLM"),
    Architecture("axk1", "AXK1ForCausalLM"),
    Architecture("axk2", "AXK2ForCausalLM"),
    Architecture("bailing_hybrid", "BailingHybridForCausalLM"),
    Architecture("beam", "BeamForCausalLM"),
    Architecture("cohere2_moe", "Cohere2MoeForCausalLM"),
    Architecture(
        "cohere2_moe_sigmoid",
        "Cohere2MoeForCausalLM",
        {"expert_selection_fn": "sigmoid"},
        package="cohere2_moe",
    ),
    Architecture(
        "dbrx",
        "DbrxForCausalLM",
        {
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 48,
                "moe_num_experts": 8,
                "moe_top_k": 2,
            },
        },
    ),
    Architecture("deepseek_ocr2", "DeepseekOcr2TextModel"),
    Architecture("deepseek_v2", "DeepseekV2ForCausalLM"),
    Architecture(
        "deepseek_v2_groups", "DeepseekV2ForCausalLM", _GROUPS_BY_BEST, package="deepseek_v2"
    ),
    Architecture("deepseek_v3", "DeepseekV3ForCausalLM"),
    Architecture("deepseek_v32", "DeepseekV32ForCausalLM"),
    Architecture(
        "deepseek_v4",
        "DeepseekV4ForCausalLM",
        {
            "num_key_value_heads": 1,
            "mlp_layer_types": ["hash_moe", "moe"],
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "o_groups": 2,
            "o_lora_rank": 16,
            "hc_mult": 2,
        },
    ),
    Architecture("diffusion_gemma", "DiffusionGemmaEncoderTextModel", _GEMMA),
    Architecture(
        "diffusion_gemma_canvas",
        "DiffusionGemmaDecoderModel",
        {"text_config": _GEMMA},
        package="diffusion_gemma",
        inputs="canvas",
    ),
    Architecture("doge", "DogeForCausalLM", {"is_moe": True, "num_experts": 16}),
    Architecture("dots1", "Dots1ForCausalLM"),
    Architecture("dots3_note", "Dots3NoteForCausalLM"),
    Architecture(
        "dots3_note_vision",
        "Dots3NoteVisionModel",
        {"patch_size": 4, "adapter_in_dim": 64, "adapter_out_dim": 64},
        package="dots3_note",
        inputs="patches",
    ),
    Architecture(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    ),
    Architecture(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        {
            "moe_intermediate_size": [48, 32],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 4],
            },
        },
        inputs="two modalities",
    ),
    Architecture("exaone_moe", "ExaoneMoeForCausalLM"),
    Architecture("flex_olmo", "FlexOlmoForCausalLM"),
    Architecture("flint", "FlintForCausalLM"),
    Architecture(
        "gemma4",
        "Gemma4ForCausalLM",
        {**_GEMMA, "enable_moe_block": True, "hidden_size_per_layer_input": 0},
    ),
    Architecture("glm4_moe", "Glm4MoeForCausalLM"),
    Architecture("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    Architecture(
        "glm4v_moe",
        "Glm4vMoeTextModel",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    Architecture(
        "glm5_next",
        "Glm5NextTextModel",
        {
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "index_kpool": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Architecture("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    Architecture("gpt_oss", "GptOssForCausalLM", _ROPE),
    Architecture("granitemoe", "GraniteMoeForCausalLM"),
    Architecture("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Architecture(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_expand": 1,
            "mamba_chunk_size": 8,
        },
    ),
    Architecture("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    Architecture("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    Architecture("hy_v3", "HYV3ForCausalLM"),
    Architecture("hy_v4", "HYV4ForCausalLM"),
    Architecture("inkling", "InklingForCausalLM", _INKLING),
    Architecture("inkling2", "Inkling2ForCausalLM", _INKLING),
    Architecture(
        "jamba",
        "JambaForCausalLM",
        {
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    # Padded on the right: what precedes every real token attends to nothing, and its attention
    # experts give zero with any weights, which an ablation cannot see.
    Architecture(
        "jetmoe",
        "JetMoeForCausalLM",
        {"kv_channels": 16, "num_key_value_heads": 2},
        inputs="padded right",
    ),
    Architecture(
        "kimi_linear",
        "KimiLinearForCausalLM",
        {
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Architecture("kolibri1", "Kolibri1ForCausalLM"),
    Architecture("laguna", "LagunaForCausalLM"),
    Architecture("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    Architecture("llama4", "Llama4ForCausalLM", {"num_experts_per_tok": 1}),
    Architecture("llama4_top2", "Llama4ForCausalLM", package="llama4"),
    Architecture(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        {"zero_expert_num": 4, "moe_topk": 3, "head_dim": 8},
    ),
    Architecture("mellum", "MellumForCausalLM"),
    Architecture("mimo_v2_flash", "MiMoV2FlashForCausalLM", {"num_key_value_heads": 2}),
    Architecture("minimax", "MiniMaxForCausalLM"),
    Architecture("minimax_m2", "MiniMaxM2ForCausalLM"),
    Architecture("minimax_m3_vl", "MiniMaxM3VLTextModel"),
    Architecture("mistral4", "Mistral4ForCausalLM"),
    Architecture("mistral_large4", "MistralLarge4TextModel", _ROPE),
    Architecture("mixtral", "MixtralForCausalLM"),
    Architecture(
        "muse_spark", "MuseSparkTextModel", {"moe_hidden_size": 32, "output_multiplier": 1.0}
    ),
    Architecture(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "moe_latent_size": 32,
        },
    ),
    Architecture(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        {
            **_CAPACITY,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "decoder_start_token_id": 2,
            "moe_eval_capacity_token_fraction": 0.3,
        },
        inputs="encoder-decoder",
    ),
    Architecture("olmoe", "OlmoeForCausalLM"),
    Architecture("openai_privacy_filter", "OpenAIPrivacyFilterModel", _ROPE),
    Architecture("phimoe", "PhimoeForCausalLM"),
    Architecture("qwen2_moe", "Qwen2MoeForCausalLM"),
    Architecture("qwen3_5_moe", "Qwen3_5MoeForCausalLM", _FULL_AND_LINEAR),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    Architecture("qwen3_next", "Qwen3NextForCausalLM", _FULL_AND_LINEAR),
    Architecture("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    Architecture(
        "qwen3_omni_moe_talker",
        "Qwen3OmniMoeTalkerModel",
        {"shared_expert_intermediate_size": 48},
        package="qwen3_omni_moe",
        inputs="embeddings",
    ),
    Architecture("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    Architecture(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        {**_FULL_AND_LINEAR, **_QWEN4_INDEXER, "hc_count": 2, "hc_lowrank": 8},
    ),
    Architecture("solar_open", "SolarOpenForCausalLM"),
    Architecture(
        "step3p7",
        "Step3p7TextModel",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    ),
    Architecture(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {
            **_CAPACITY,
            "d_kv": 16,
            "d_ff": 48,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "decoder_start_token_id": 0,
        },
        inputs="encoder-decoder",
    ),
    Architecture("unlimited_ocr", "UnlimitedOcrTextModel"),
    Architecture(
        "vitpose_backbone",
        "VitPoseBackbone",
        {
            "image_size": (32, 16),
            "patch_size": (8, 8),
            "mlp_ratio": 2,
            "num_experts": 6,
            "part_features": 16,
        },
        inputs="images",
    ),
    Architecture("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 32}),
]
ZOO = {x.name: x for x in _ALL}

REFUSED: dict[str, str] = {}
"""Packages with routed experts that moe_lens does not record, and why."""

NO_ROUTED_EXPERTS = {
    "bamba": "copies a layer that could hold experts, and sets their number to one",
    "gemma3n": "AltUp predicts and corrects copies of the stream; nothing is chosen",
    "granite_docling": "its router decides which image tiles are kept; there are no experts",
    "pi0": "the action expert is a second network for other tokens; nothing is routed",
}
"""Packages whose source speaks of experts or routers and has no routed experts, and why."""

NEVER_BUILT = {"Qwen3OmniMoeTextTopKRouter": "defined, and used by no model"}
"""Classes that speak of experts and stand in no model of their package, and why."""
