"""The layer against a loop over tokens and experts, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lens.granularity.layer import MoE
from moe_lens.granularity.shapes import Kind, Shape

KINDS: tuple[Kind, ...] = ("constant", "linear", "relu")
SHAPE, HIDDEN = Shape(6, 3, 4), 5


def layer(kind: Kind, *, gate_bias: bool = False, seed: int = 0) -> MoE:
    drawn = torch.Generator().manual_seed(seed)
    return MoE(SHAPE, HIDDEN, kind, drawn, gate_bias=gate_bias).double()


def token_by_token(of: MoE, x_TD: Tensor) -> Tensor:
    """sum over the k largest logits of softmax(those)_j E_j(x), with single numbers."""
    w, d = of.shape.width, of.hidden
    gate, offset = of.gate_ED.tolist(), [0.0] * of.shape.experts
    if of.gate_E is not None:
        offset = of.gate_E.tolist()
    rows = []
    for x in x_TD.tolist():
        logits = [sum(a * b for a, b in zip(g, x, strict=True)) + o
                  for g, o in zip(gate, offset, strict=True)]  # fmt: skip
        best = sorted(range(len(logits)), key=lambda j: -logits[j])[: of.shape.top_k]
        total = sum(math.exp(logits[j]) for j in best)
        y = [0.0] * d
        for j in best:
            out = list(of.out_ED[j].tolist())
            if of.kind != "constant":
                for f in range(j * w, (j + 1) * w):
                    h = of.in_H[f].item() + sum(of.in_DH[i, f].item() * x[i] for i in range(d))
                    if of.kind == "relu":
                        h = max(h, 0.0)
                    out = [o + h * of.out_HD[f, i].item() for i, o in enumerate(out)]
            y = [a + math.exp(logits[j]) / total * b for a, b in zip(y, out, strict=True)]
        rows.append(y)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_bias", [False, True])
def test_it_is_the_sum_over_a_tokens_experts(kind: Kind, gate_bias: bool) -> None:
    of = layer(kind, gate_bias=gate_bias)
    x_TD = torch.randn(40, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(of(x_TD).detach(), token_by_token(of, x_TD), rtol=1e-12, atol=1e-12)


def test_the_gates_bias_decides() -> None:
    of = layer("linear", gate_bias=True)
    assert of.gate_E is not None
    with torch.no_grad():
        of.gate_E += torch.tensor([0.0, 0, 0, 100, 100, 100])
    _, weights_TK, ids_TK = of.route(torch.randn(9, HIDDEN, dtype=torch.float64))
    assert set(ids_TK.flatten().tolist()) == {3, 4, 5}
    torch.testing.assert_close(weights_TK.sum(1), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_everything(kind: Kind) -> None:
    of = layer(kind, gate_bias=True)
    x_TD = torch.randn(64, HIDDEN, dtype=torch.float64)
    of(x_TD).square().sum().backward()
    for name, parameter in of.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_weights_are_drawn_as_torchs_linear_draws_them() -> None:
    of = MoE(Shape(64, 2, 25), 100, "linear", torch.Generator().manual_seed(0), gate_bias=True)
    assert of.gate_E is not None
    for parameter, fan_in in ((of.gate_ED, 100), (of.gate_E, 100), (of.in_DH, 100), (of.in_H, 100),
                              (of.out_HD, 25), (of.out_ED, 25)):  # fmt: skip
        bound = fan_in**-0.5
        assert 0.95 * bound < parameter.abs().max().item() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    theirs = torch.nn.Linear(100, 400)  # what we hold to be torch's default
    for parameter in theirs.parameters():
        assert 0.095 < parameter.abs().max().item() <= 0.1


def test_constant_experts_have_a_mean_squared_norm_of_1() -> None:
    of = MoE(Shape(400, 2, 1), 50, "constant", torch.Generator().manual_seed(0))
    assert of.out_ED.square().sum(1).mean().item() == pytest.approx(1, rel=0.05)
    assert of.out_ED.mean().item() == pytest.approx(0, abs=0.005)


def test_two_generators_are_two_layers() -> None:
    a, same, other = layer("linear"), layer("linear"), layer("linear", seed=1)
    assert torch.equal(a.in_DH, same.in_DH)
    assert not torch.equal(a.in_DH, other.in_DH)
