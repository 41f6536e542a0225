"""Builds an architecture of the zoo, small and random, and a batch for it."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
import transformers
from support.zoo.catalog import Architecture
from torch import Tensor, nn

HIDDEN, EXPERTS, TOP_K, LAYERS, HEADS, VOCAB = 64, 8, 2, 2, 4, 96

_SIZES: list[tuple[Any, str]] = [
    (VOCAB, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (HIDDEN, "hidden_size d_model"),
    (
        48,
        "intermediate_size dense_intermediate_size moe_intermediate_size shared_intermediate_size "
        "shared_expert_intermediate_size prefix_dense_intermediate_size ffn_hidden_size "
        "expert_ffn_hidden_size intermediate_size_mlp shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size share_expert_dim",
    ),
    (LAYERS, "num_hidden_layers num_layers"),
    (HEADS, "num_attention_heads num_key_value_heads n_group num_expert_group"),
    (16, "head_dim v_head_dim kv_lora_rank q_lora_rank index_topk index_head_dim"),
    (8, "qk_rope_head_dim qk_nope_head_dim"),
    (64, "max_position_embeddings"),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (TOP_K, "num_experts_per_tok moe_k moe_topk top_k_experts topk_group index_n_heads"),
    (2, "num_shared_experts n_shared_experts moe_num_shared_experts"),
    (1, "decoder_sparse_step"),
    (0, "first_k_dense_replace num_dense_layers pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (["sparse"] * LAYERS, "mlp_layer_types"),
    ([], "mlp_only_layers"),
    (False, "use_cache"),
]
COMMON = {name: value for value, names in _SIZES for name in names.split()}
"""Sizes that every config gets which has a field of that name."""


def build(entry: Architecture, *, seed: int = 0) -> nn.Module:
    """The model, random and in eval mode.

    Weights are wider than a default initialisation, so that routing is not near-uniform; selection
    biases are not zero, so that ids differ from top-k of the logits; hash tables are random.
    """
    torch.manual_seed(seed)
    home = f"transformers.models.{entry.home}"
    cls = getattr(importlib.import_module(f"{home}.modeling_{entry.home}"), entry.model)
    model: nn.Module = cls(_config(cls.config_class, entry.sizes))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # DeepSeek-V4's: token id to its experts
                tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(-1)[:, : tensor.shape[1]])
            elif name.endswith("balancing_biases"):  # Zaya's: the last class skips the experts
                tensor.normal_(0, 0.02)[-1] = 0.02
            elif "correction_bias" in name or "expert_bias" in name:
                tensor.normal_(0, 0.1)
            elif "per_expert_scale" in name:
                tensor.uniform_(0.5, 2.0)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                tensor.normal_(0, 0.15)
    return model.eval()


def _config(cls: Any, sizes: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    known |= {alias for alias, name in cls.attribute_map.items() if name not in {*known, *sizes}}
    parts = {k: _config(cls.sub_configs[k], v) for k, v in sizes.items() if k == "text_config"}
    return cls(**{k: v for k, v in COMMON.items() if k in known} | sizes | parts)


def batch(entry: Architecture, *, seed: int = 1) -> dict[str, Any]:
    """What the model's forward takes: two sequences of twelve tokens, three of them padding."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(B: int, S: int) -> Tensor:
        return torch.randint(3, VOCAB, (B, S), generator=generator)

    if entry.inputs == "images":
        images = torch.randn(3, 3, *entry.sizes["image_size"], generator=generator)
        return {"pixel_values": images, "dataset_index": torch.tensor([4, 0, 2])}
    if entry.inputs == "patches":
        patches = torch.randn(24, 3 * entry.sizes["patch_size"] ** 2, generator=generator)
        return {"pixel_values": patches, "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
    if entry.inputs == "canvas":
        cache = transformers.DynamicCache()  # of the prompt that the canvas goes on from
        for layer in range(LAYERS):
            cache.update(*torch.randn(2, 2, HEADS, 5, 16, generator=generator), layer)
        return {"decoder_input_ids": tokens(2, 12), "past_key_values": cache}
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    padding = slice(9, None) if entry.inputs == "padded right" else slice(3)
    ids[0, padding] = mask[0, padding] = 0
    if entry.inputs == "embeddings":
        embeds = torch.randn(2, 12, HIDDEN, generator=generator)
        return {"inputs_embeds": embeds, "attention_mask": mask}
    out = {"input_ids": ids, "attention_mask": mask}
    if entry.inputs == "encoder-decoder":
        out["decoder_input_ids"] = tokens(2, 7)
    elif entry.inputs == "two modalities":
        kinds = torch.zeros_like(ids)
        kinds[0, 5:9] = kinds[1, 2:4] = 1
        out["moe_mm_token_type_ids"] = kinds
    return out
