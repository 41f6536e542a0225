"""Small random models of the families that the adapters serve."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN, EXPERTS, LAYERS, VOCAB = 64, 8, 3, 96


def _common() -> dict[str, int]:
    return {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
    }


def build(name: str, *, top_k: int = 2, seed: int = 0) -> nn.Module:
    """A causal language model of a family, random and in eval mode.

    Weights are wider than a default initialisation, so that routing is not near-uniform, and
    selection biases are not zero, so that ids differ from top-k of the logits.
    """
    import transformers as tf

    torch.manual_seed(seed)
    common = _common()
    if name == "mixtral":
        config = tf.MixtralConfig(
            **common, intermediate_size=48, num_local_experts=EXPERTS, num_experts_per_tok=top_k
        )
        model: nn.Module = tf.MixtralForCausalLM(config)
    elif name == "qwen3_moe":
        config = tf.Qwen3MoeConfig(
            **common,
            intermediate_size=48,
            moe_intermediate_size=48,
            num_experts=EXPERTS,
            num_experts_per_tok=top_k,
            head_dim=16,
            norm_topk_prob=True,
        )
        model = tf.Qwen3MoeForCausalLM(config)
    elif name == "olmoe":
        config = tf.OlmoeConfig(
            **common, intermediate_size=48, num_experts=EXPERTS, num_experts_per_tok=top_k
        )
        model = tf.OlmoeForCausalLM(config)
    elif name == "deepseek_v3":
        config = tf.DeepseekV3Config(
            **{**common, "num_key_value_heads": 4},
            intermediate_size=48,
            moe_intermediate_size=48,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=top_k,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        )
        model = tf.DeepseekV3ForCausalLM(config)
    elif name == "gpt_oss":
        config = tf.GptOssConfig(
            **common,
            intermediate_size=48,
            num_local_experts=EXPERTS,
            num_experts_per_tok=top_k,
            head_dim=16,
        )
        model = tf.GptOssForCausalLM(config)
    else:
        raise ValueError(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.normal_(0, 0.1)
    return model.eval()


FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def switch(*, capacity: int = 4, seed: int = 0) -> nn.Module:
    """A Switch Transformers encoder-decoder that drops tokens at this capacity."""
    import transformers as tf

    torch.manual_seed(seed)
    config = tf.SwitchTransformersConfig(
        d_model=HIDDEN,
        d_ff=48,
        d_kv=16,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=EXPERTS,
        expert_capacity=capacity,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model: nn.Module = tf.SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


class TinyBlock(nn.Module):
    """A hand-written MoE block in the fused-experts form, without transformers."""

    def __init__(self, experts: int = 4, top_k: int = 2, width: int = 8) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = TinyRouter(experts, top_k, width)
        self.experts = TinyExperts(experts, width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        _, weights_TK, ids_TK = self.gate(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x_BSD)


class TinyRouter(nn.Module):
    def __init__(self, experts: int, top_k: int, width: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, width))

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = x_TD @ self.weight.T
        prob_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k)
        return logits_TE, prob_TK / prob_TK.sum(-1, keepdim=True), ids_TK


class TinyExperts(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(
        self, x_TD: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        ids_TK = top_k_index.clamp(0, self.num_experts - 1)
        y_TKD = torch.einsum("td,tkdf->tkf", x_TD, self.weight[ids_TK])
        return (y_TKD * top_k_weights.unsqueeze(-1)).sum(1)


class TinyModel(nn.Module):
    """Two hand-written MoE blocks behind an embedding."""

    def __init__(self, experts: int = 4, top_k: int = 2, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(TinyBlock(experts, top_k, width) for _ in range(blocks))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x
