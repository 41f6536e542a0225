"""Attention, positions, embedding, and the model as a whole."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moe_lens.demo.model import (
    Attention,
    MoEConfig,
    MoELanguageModel,
    ngram_hash,
    rope_tables,
    rotate,
)


def make_model(config: MoEConfig) -> MoELanguageModel:
    torch.manual_seed(0)
    model = MoELanguageModel(config)
    for parameter in model.parameters():  # what starts at zero would hide a leak
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_later_byte_changes_no_earlier_logits(config: MoEConfig) -> None:
    model = make_model(config).double().eval()
    tokens_BS = torch.randint(0, 256, (2, 24))
    changed_BS = tokens_BS.clone()
    changed_BS[:, 15] = (changed_BS[:, 15] + 1) % 256
    before, after = model(tokens_BS).logits_BSV, model(changed_BS).logits_BSV
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-12)
    assert ((before - after)[:, 15:].abs().amax(-1) > 1e-9).all()


def test_outputs_of_the_forward(config: MoEConfig) -> None:
    model = make_model(config).eval()
    tokens_BS = torch.randint(0, 256, (2, 9))
    targets_BS = torch.randint(0, 256, (2, 9))
    assert model(tokens_BS).loss_BS is None
    out = model(tokens_BS, targets_BS)
    log_prob_BSV = out.logits_BSV.log_softmax(-1)
    expected_BS = -log_prob_BSV.gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.loss_BS, expected_BS)
    assert out.aux_loss.shape == out.z_loss.shape == ()


def test_aux_losses_are_means_over_layers(config: MoEConfig) -> None:
    model = make_model(config).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda _, args, output: seen.append(output[1:]))
    out = model(torch.randint(0, 256, (2, 9)))
    assert len(seen) == config.num_hidden_layers
    assert out.aux_loss.item() == pytest.approx(sum(a.item() for a, _ in seen) / len(seen))
    assert out.z_loss.item() == pytest.approx(sum(z.item() for _, z in seen) / len(seen))


def test_training_drops_and_evaluation_does_not(config: MoEConfig) -> None:
    model = make_model(dataclasses.replace(config, capacity_factor=1.0))
    kept: list[torch.Tensor | None] = []
    for block in model.blocks:
        block.moe.experts.register_forward_pre_hook(lambda _, args: kept.append(args[3]))
    tokens_BS = torch.randint(0, 256, (2, 32))
    model.train()(tokens_BS)
    assert any(not mask.all() for mask in kept)
    kept.clear()
    model.eval()(tokens_BS)
    assert kept == [None, None]


def test_an_untrained_model_guesses(config: MoEConfig) -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(config).eval()
    tokens_BS = torch.randint(0, 256, (4, 64))
    loss = model(tokens_BS, tokens_BS.roll(-1, 1)).loss_BS.mean().item()
    assert loss == pytest.approx(math.log(256), abs=1.0)


def test_attention_equals_a_loop_over_positions(config: MoEConfig) -> None:
    torch.manual_seed(0)
    attention = Attention(config).double()
    x_BSD = torch.randn(1, 6, 32, dtype=torch.float64)
    q, k, v = attention.qkv(x_BSD[0]).view(6, 3, 2, 16).unbind(1)
    cos, sin = rope_tables(6, 16, config.rope_theta)

    def turn(x_H: torch.Tensor, position: int) -> torch.Tensor:
        normed = x_H / (x_H.square().mean() + config.rms_norm_eps).sqrt()
        pairs = torch.complex(normed[:8], normed[8:])
        angle = torch.complex(cos[position, :8].double(), sin[position, :8].double())
        return torch.cat([(pairs * angle).real, (pairs * angle).imag])

    y = torch.zeros(6, 2, 16, dtype=torch.float64)
    for s in range(6):
        for n in range(2):
            scores = torch.stack([turn(q[s, n], s) @ turn(k[t, n], t) / 4 for t in range(s + 1)])
            y[s, n] = scores.softmax(0) @ v[: s + 1, n]
    torch.testing.assert_close(attention(x_BSD)[0], attention.output(y.flatten(1)))


def test_rope_depends_on_the_distance_alone() -> None:
    cos, sin = rope_tables(40, 16, 10_000.0)
    q, k = torch.randn(16), torch.randn(16)

    def score(at: int, back: int) -> float:
        return (rotate(q, cos[at], sin[at]) @ rotate(k, cos[back], sin[back])).item()

    assert score(12, 5) == pytest.approx(score(37, 30), abs=1e-4)
    assert score(12, 5) != pytest.approx(score(12, 6), abs=1e-4)


def test_ngram_hash_sees_the_bytes_that_end_at_a_position() -> None:
    tokens_BS = torch.tensor([list(b"abcabc"), list(b"xxcabd")])
    hash_BS = ngram_hash(tokens_BS, 3, 16_384)
    assert ((hash_BS >= 0) & (hash_BS < 16_384)).all()
    assert hash_BS[0, 2] == hash_BS[0, 5]
    assert hash_BS[0, 4] == hash_BS[1, 4]
    assert hash_BS[0, 5] != hash_BS[1, 5]


def test_ngram_hash_uses_its_buckets_evenly() -> None:
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    counts = ngram_hash(pairs, 2, 1024)[:, 1].bincount(minlength=1024)
    assert counts.min() > 0
    assert counts.max() < 4 * 64


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 is not an even multiple of 4 heads"):
        Attention(MoEConfig(hidden_size=30, num_attention_heads=4))
