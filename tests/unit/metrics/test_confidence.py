"""Confidence: from distributions written out, and laws between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import confidence
from moe_lens.metrics.balance import entropy
from moe_lens.metrics.catalogue import METRICS, measure
from moe_lens.metrics.evidence import Evidence


def told(**values: float | None) -> dict[str, float | None]:
    return {"entropy": None, "margin": None, "top1_prob": None, "zloss": None} | values


@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(0.1, 8))
def test_information_is_never_negative(tokens: int, outputs: int, seed: int, scale: float) -> None:
    z = scale * np.random.default_rng(seed).normal(size=(tokens, outputs))
    p = confidence.probabilities(z, "softmax")
    each = float(entropy(p).mean())
    found = confidence.routing_information(p.mean(0), told(entropy=each))
    # The same as a mean of Kullback-Leibler divergences from the mean distribution.
    wanted = np.mean([sum(a * math.log(a / b) for a, b in zip(row, p.mean(0), strict=True) if a > 0)
                      for row in p])  # fmt: skip
    assert found == pytest.approx(wanted, abs=1e-9)
    assert found >= -1e-12


def test_the_four_corners() -> None:
    sure = np.eye(4)
    undecided = np.full((4, 4), 0.25)
    collapsed = np.tile([1.0, 0, 0, 0], (4, 1))
    for p, whole, each in ((sure, math.log(4), 0), (undecided, math.log(4), math.log(4)),
                           (collapsed, 0, 0)):  # fmt: skip
        assert confidence.mean_entropy(p.mean(0)) == pytest.approx(whole)
        assert entropy(p).mean() == pytest.approx(each)
        found = confidence.routing_information(p.mean(0), told(entropy=each))
        assert found == pytest.approx(whole - each)


def test_a_router_without_a_distribution_has_no_entropy() -> None:
    known = Evidence(experts=4, outputs=4, prob_V=np.full(4, 0.25), router_confidence=told())
    for name in ("token_entropy", "routing_information", "margin", "top1_prob", "z_loss"):
        assert measure(METRICS[name], known).lacks
        assert np.isnan(measure(METRICS[name], known).value)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_what_logits_mean(score: str) -> None:
    z = np.array([[0.0, 1.0, -2.0], [800.0, -800.0, 3.0], [-np.inf, 0.5, 0.5]])
    p = confidence.probabilities(z, score)
    assert p.sum(1) == pytest.approx(np.ones(3))
    positive = {
        "softmax": math.exp,
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
    }[score]
    wanted = [positive(x) for x in z[0]]
    assert p[0] == pytest.approx([x / sum(wanted) for x in wanted])
    assert p[2] == pytest.approx([0, 0.5, 0.5])


def test_scores_are_not_comparable() -> None:
    """Pitfall 10: the same logits are sure by softmax, and hardly so by sigmoid."""
    z = np.array([[8.0, 2.0, 2.0, 2.0]])
    soft, sig = (entropy(confidence.probabilities(z, s))[0] for s in ("softmax", "sigmoid"))
    assert soft < 0.06
    assert sig > 1.38
    with pytest.raises(ValueError, match="got 'relu'"):
        confidence.probabilities(z, "relu")


def test_margins() -> None:
    z = np.array([[3.0, 1.0, 0.5, 0.0], [0.0, 2.0, 1.5, 2.25]])
    assert confidence.boundary_margin(z, 2) == pytest.approx((0.5 + 0.5) / 2)
    assert confidence.boundary_margin(z, 1) == pytest.approx((2 + 0.25) / 2)
    assert np.isnan(confidence.boundary_margin(z, 4))  # nothing is left out
    p = confidence.probabilities(z, "softmax")
    wanted = np.mean([sorted(row)[-1] - sorted(row)[-2] for row in p])
    assert confidence.top1_margin(p) == pytest.approx(wanted)
    masked = np.array([[1.0, 0.0, -np.inf]])
    assert confidence.boundary_margin(masked, 1) == 1
    assert np.isnan(confidence.boundary_margin(masked, 2))


def test_near_ties_are_of_the_size_of_bfloat16() -> None:
    """Pitfall 14."""
    assert confidence.bf16_step(np.array([2.0, 3.99, -2.5, 4.0, 1.0])) == pytest.approx(
        [0.015625, 0.015625, 0.015625, 0.03125, 0.0078125]
    )
    z = np.array([[2.0, 2.0 - 0.01], [2.0, 2.0 - 0.02], [100.0, 99.6], [0.5, 0.5]])
    assert confidence.bf16_ties(z, 1) == 0.75  # all but the second


def test_every_bfloat16_has_its_step() -> None:
    """Against the bits: the next number is one more in the upper half of a float32."""
    bits = np.arange(0x3C00, 0x4400, 7, dtype=np.uint32) << np.uint32(16)
    x, after = bits.view(np.float32), (bits + np.uint32(1 << 16)).view(np.float32)
    assert confidence.bf16_step(x) == pytest.approx(after - x, rel=1e-6)


def test_mass_and_gates() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    chosen = np.array([[True, True, False], [False, True, True]])
    assert confidence.top_k_mass(p, chosen) == pytest.approx((0.8 + 0.9) / 2)
    gates = np.array([[0.5, 0.5, 0], [0, 0, 3.0], [0, 0, 0]])
    assert confidence.gate_entropy(gates) == pytest.approx(math.log(2) / 2)  # a token without: out
    assert np.isnan(confidence.gate_entropy(np.zeros((2, 3))))
    assert confidence.gate_gap(np.array([5, 5]), np.array([9.0, 1.0])) == pytest.approx(0.4)
    assert confidence.gate_gap(np.array([5, 5]), np.array([2.0, 2.0])) == 0


def test_scale() -> None:
    z = np.array([[1.0, -3.0], [-np.inf, 2.0]])
    assert confidence.logit_scale(z) == 2
    assert confidence.logit_max(z) == 3


def test_nulls_are_those_of_a_router_that_knows_nothing() -> None:
    z = np.zeros((5, 8))
    p = confidence.probabilities(z, "softmax")
    known = Evidence(
        experts=8,
        outputs=8,
        top_k=2,
        prob_V=p.mean(0),
        prob_TV=p,
        logits_TV=z,
        chosen_TV=np.tile(np.arange(8) < 2, (5, 1)),
        weight_TV=np.tile(np.where(np.arange(8) < 2, 0.5, 0), (5, 1)),
        router_confidence=told(entropy=math.log(8), top1_prob=1 / 8, zloss=math.log(8) ** 2),
    )
    for name in ("token_entropy", "mean_entropy", "routing_information", "top1_prob",
                 "top1_margin", "top_k_mass", "gate_entropy", "z_loss"):  # fmt: skip
        found = measure(METRICS[name], known)
        assert found.chance is not None, name
        assert found.value == pytest.approx(found.chance.expected, abs=1e-12), name
