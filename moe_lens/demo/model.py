"""What is the demo model? A decoder-only Mixture-of-Experts language model over bytes.

Bytes embedded with hashes of the bytes before them, RMSNorm before each sub-layer, causal
attention with rotary positions, and in every block a Mixture-of-Experts layer of SwiGLU experts
(``moe_lens.demo.moe``) in place of the feed-forward.

Tensor names carry their shape:

    B batch, S sequence, D hidden, V vocabulary (bytes), N head count, H head dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lens.demo.moe import MoE


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of the model. The defaults are the demo's."""

    vocab_size: int = 256
    ngram_lengths: tuple[int, ...] = (2, 3)
    ngram_buckets: int = 16_384
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 192
    capacity_factor: float = 1.25
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Output:
    """What one forward returns.

    Attributes:
        logits_BSV: Scores of the next byte.
        loss_BS: Cross entropy of each target in nats; None without targets.
        aux_loss: Scalar, Switch load-balancing loss, mean over layers; 1 when balanced.
        z_loss: Scalar, router z-loss, mean over layers.
    """

    logits_BSV: Tensor
    loss_BS: Tensor | None
    aux_loss: Tensor
    z_loss: Tensor


class MoELanguageModel(nn.Module):
    """Bytes in, scores of the next byte out."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = ByteEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._init_weights()

    def forward(self, input_ids: Tensor, targets_BS: Tensor | None = None) -> Output:
        """Run the model.

        Args:
            input_ids: int64 bytes [B, S]; by the name under which models are given them.
            targets_BS: int64 bytes [B, S] that should follow each token; None for no loss.
        """
        x_BSD = self.embedding(input_ids)
        aux_losses, z_losses = [], []
        for block in self.blocks:
            x_BSD, aux_loss, z_loss = block(x_BSD)
            aux_losses.append(aux_loss)
            z_losses.append(z_loss)
        logits_BSV = self.head(self.norm(x_BSD))
        loss_BS = None
        if targets_BS is not None:
            loss_BS = F.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="none")
        return Output(
            logits_BSV, loss_BS, torch.stack(aux_losses).mean(), torch.stack(z_losses).mean()
        )

    def _init_weights(self) -> None:
        """Normal weights of variance 1/fan-in; what writes into the residual starts at zero.

        A block that adds nothing at first lets a short training use a high learning rate.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("output.weight", "down_EDF")):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


class ByteEmbedding(nn.Module):
    """Embed each byte, and hashes of the n bytes that end with it (arXiv 2412.09871, sec. 3.2.1).

    A byte alone says little. With the hashes the model starts from what a byte-count model knows,
    and the two minutes of the demo go into what lies beyond it.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.lengths, self.buckets = config.ngram_lengths, config.ngram_buckets
        self.byte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ngrams = nn.ModuleList(
            nn.Embedding(config.ngram_buckets, config.hidden_size) for _ in config.ngram_lengths
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return x_BSD, the sum of the embeddings."""
        x_BSD: Tensor = self.byte(tokens_BS)
        for length, table in zip(self.lengths, self.ngrams, strict=True):
            x_BSD = x_BSD + table(ngram_hash(tokens_BS, length, self.buckets))
        return x_BSD


class Block(nn.Module):
    """Attention, then experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = MoE(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            capacity_factor=config.capacity_factor,
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new residual stream, and the two losses of this layer's router."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        y_BSD, aux_loss, z_loss = self.moe(self.moe_norm(x_BSD))
        return x_BSD + y_BSD, aux_loss, z_loss


class Attention(nn.Module):
    """Causal self-attention with rotary positions, and normalised queries and keys."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        if hidden % (2 * heads):
            raise ValueError(f"hidden_size {hidden} is not an even multiple of {heads} heads")
        self.num_heads, self.head_dim, self.theta = heads, hidden // heads, config.rope_theta
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Attend to this and all earlier positions."""
        B, S, _ = x_BSD.shape
        qkv_BS3NH = self.qkv(x_BSD).view(B, S, 3, self.num_heads, self.head_dim)
        q_BNSH, k_BNSH, v_BNSH = qkv_BS3NH.permute(2, 0, 3, 1, 4)
        cos_SH, sin_SH = rope_tables(S, self.head_dim, self.theta, x_BSD.device)
        q_BNSH = rotate(self.query_norm(q_BNSH), cos_SH, sin_SH)
        k_BNSH = rotate(self.key_norm(k_BNSH), cos_SH, sin_SH)
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)
        out_BSD: Tensor = self.output(y_BNSH.transpose(1, 2).reshape(B, S, -1))
        return out_BSD


def ngram_hash(tokens_BS: Tensor, length: int, buckets: int) -> Tensor:
    """Bucket of the ``length`` bytes that end at each position; zeros stand before the first."""
    S = tokens_BS.shape[1]
    padded = F.pad(tokens_BS, (length - 1, 0))
    hash_BS = torch.zeros_like(tokens_BS)
    for start in range(length):
        # A multiplicative hash (Knuth's constant), kept below 2**31 so that int64 never overflows.
        hash_BS = ((hash_BS + padded[:, start : start + S] + 1) * 2_654_435_761) % (2**31 - 1)
    return hash_BS % buckets


def rope_tables(
    length: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, H] of rotary positions 0 to S - 1 (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.outer(torch.arange(length, device=device), theta**-exponents)
    angles_SH = torch.cat([angles, angles], dim=-1)
    return angles_SH.cos(), angles_SH.sin()


def rotate(x_BNSH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of every head by the angle of its position."""
    first, second = x_BNSH.chunk(2, dim=-1)
    turned_BNSH = torch.cat([-second, first], dim=-1)
    return x_BNSH * cos_SH + turned_BNSH * sin_SH
