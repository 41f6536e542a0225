"""Losses: conventions, scopes and the gap between them, against loops over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.metrics import losses
from moe_lens.metrics.catalogue import METRICS, measure
from moe_lens.metrics.confidence import probabilities
from moe_lens.metrics.evidence import Evidence


def tokens(seed: int, T: int, E: int, k: int, bias: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """p and choices `[T, E]` of a softmax router."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(T, E)) + bias * np.arange(E)
    best = np.argsort(-z, 1)[:, :k]
    chosen = np.zeros((T, E), bool)
    np.put_along_axis(chosen, best, True, 1)
    return probabilities(z, "softmax"), chosen


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (64, 8), (128, 1)])
def test_uniform_gives_one_or_k(experts: int, k: int) -> None:
    n, p = np.full(experts, 10), np.full(experts, 1 / experts)
    assert losses.switch_loss(n, p) == pytest.approx(1)
    assert losses.switch_loss_k(n, p, k) == pytest.approx(k)
    collapse = np.where(np.arange(experts) < k, 1.0, 0)
    assert losses.switch_loss(collapse, collapse / k) == pytest.approx(experts / k)
    assert losses.switch_loss_k(collapse, collapse / k, k) == pytest.approx(experts)


def test_one_is_no_lower_bound() -> None:
    # f and P against each other: what is chosen (by a bias) is what is improbable.
    assert losses.switch_loss(np.array([3, 1]), np.array([0.25, 0.75])) == pytest.approx(0.75)


def test_both_conventions_against_loops_over_tokens() -> None:
    p, chosen = tokens(0, 50, 6, 2, bias=0.4)
    T, E, k = 50, 6, 2
    share = [sum(chosen[t, i] for t in range(T)) / T for i in range(E)]  # sums to k
    mean = [sum(p[t, i] for t in range(T)) / T for i in range(E)]
    theirs = E * sum(a * b for a, b in zip(share, mean, strict=True))
    n, P = chosen.sum(0), p.mean(0)
    assert losses.switch_loss_k(n, P, k) == pytest.approx(theirs)
    assert losses.switch_loss(n, P) == pytest.approx(theirs / k)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_scopes_against_loops(seed: int, steps: int, ranks: int, forwards: int) -> None:
    rng = np.random.default_rng(seed)
    E, k = 5, 2
    made = []
    for step in range(steps):
        for rank in range(ranks):
            for _ in range(forwards):
                p, chosen = tokens(int(rng.integers(2**31)), int(rng.integers(1, 9)), E, k)
                made.append((step, rank, p, chosen))

    def loss(members: list[tuple[int, int, np.ndarray, np.ndarray]]) -> tuple[float, int]:
        p = np.concatenate([m[2] for m in members])
        n = np.concatenate([m[3] for m in members]).sum(0)
        return float(E * (n / n.sum() * p.mean(0)).sum()), len(p)

    def mean(groups: list[list[tuple[int, int, np.ndarray, np.ndarray]]]) -> float:
        found = [loss(g) for g in groups]
        return sum(x * t for x, t in found) / sum(t for _, t in found)

    counts_FE = np.array([m[3].sum(0) for m in made])
    prob_FV = np.array([m[2].mean(0) for m in made])
    tokens_F = np.array([len(m[2]) for m in made])
    step_F, rank_F = np.array([m[0] for m in made]), np.array([m[1] for m in made])
    micro = losses.switch_loss_micro(counts_FE, prob_FV, tokens_F)
    assert micro == pytest.approx(mean([[m] for m in made]))
    by_rank = [[m for m in made if m[:2] == (s, r)] for s in range(steps) for r in range(ranks)]
    assert losses.switch_loss_rank(counts_FE, prob_FV, tokens_F, step_F, rank_F) == (
        pytest.approx(mean(by_rank))
    )
    whole = mean([[m for m in made if m[0] == s] for s in range(steps)])
    assert losses.switch_loss_global(counts_FE, prob_FV, tokens_F, step_F) == pytest.approx(whole)
    gap = losses.scope_gap(counts_FE, prob_FV, tokens_F, step_F)
    assert gap == pytest.approx(micro - whole)
    # E sum Cov(f, P), weighed by tokens, step by step.
    f_FE = counts_FE / counts_FE.sum(1, keepdims=True)
    cov = 0.0
    for s in range(steps):
        w = tokens_F * (step_F == s)
        fm, pm = (w @ x / w.sum() for x in (f_FE, prob_FV))
        cov += E * float((w[:, None] * (f_FE - fm) * (prob_FV - pm)).sum())
    assert gap == pytest.approx(cov / tokens_F.sum(), abs=1e-9)


def test_two_specialised_micro_batches_are_balanced_together() -> None:
    """Pitfall 5: per device they look collapsed, globally they are perfect."""
    counts_FE = np.array([[10, 10, 0, 0], [0, 0, 10, 10]])
    prob_FV = counts_FE / 20
    T, same = np.array([10, 10]), np.array([0, 0])
    assert losses.switch_loss_micro(counts_FE, prob_FV, T) == pytest.approx(2)
    assert losses.switch_loss_rank(counts_FE, prob_FV, T, same, np.array([0, 1])) == (
        pytest.approx(2)
    )
    assert losses.switch_loss_global(counts_FE, prob_FV, T, same) == pytest.approx(1)
    assert losses.scope_gap(counts_FE, prob_FV, T, same) == pytest.approx(1)


def test_uneven_groups_are_weighed_by_their_tokens() -> None:
    """Pitfall 4: a mean of ratios is not a ratio of sums."""
    counts_FE, T = np.array([[9, 9], [2, 0]]), np.array([18, 2])
    prob_FV = np.array([[0.5, 0.5], [1.0, 0.0]])
    assert losses.switch_loss_micro(counts_FE, prob_FV, T) == pytest.approx((18 * 1 + 2 * 2) / 20)


def test_layers_are_not_put_together() -> None:
    """What transformers does: the collapse of both layers disappears in the mean over layers."""
    a = np.array([4.0, 0.0])
    assert losses.switch_loss(a, a) == losses.switch_loss(a[::-1], a[::-1]) == 2
    assert losses.switch_loss(a + a[::-1], a + a[::-1]) == 1


def test_sequences() -> None:
    p, chosen = tokens(4, 30, 6, 2, bias=0.5)
    sequence = np.repeat([0, 1, 2], [5, 10, 15])
    wanted = 0.0
    for s, T in ((0, 5), (1, 10), (2, 15)):
        f = chosen[sequence == s].sum(0) / (2 * T)
        wanted += T * 6 * float((f * p[sequence == s].mean(0)).sum())
    assert losses.switch_loss_sequence(chosen, p, sequence, 6) == pytest.approx(wanted / 30)


@pytest.mark.parametrize(
    ("experts", "golden"), [(8, 4.324), (32, 12.011), (64, 17.296), (128, 23.542), (256, 30.749)]
)
def test_z_loss_of_zero_logits(experts: int, golden: float) -> None:
    known = Evidence(experts=experts, outputs=experts, router_confidence={"zloss": golden})
    found = measure(METRICS["z_loss"], known)
    assert found.value == golden  # home: SQL; tests of router_confidence compute it
    assert found.chance is not None
    assert found.chance.expected == pytest.approx(golden, abs=5e-4)
    assert found.chance.expected == pytest.approx(math.log(experts) ** 2)


def test_a_shift_moves_z_loss_alone() -> None:
    z = np.random.default_rng(0).normal(size=(20, 8))
    a, b = probabilities(z, "softmax"), probabilities(z + 5, "softmax")
    n = np.arange(1, 9)
    assert losses.switch_loss(n, a.mean(0)) == pytest.approx(losses.switch_loss(n, b.mean(0)))
    lse = np.log(np.exp(z).sum(1))
    assert ((lse + 5) ** 2).mean() > (lse**2).mean() + 25


def test_importance_and_load_disagree() -> None:
    n, gates = np.array([10, 10, 10, 10]), np.array([9.0, 1.0, 1.0, 1.0])
    assert losses.load_cv2(n) == pytest.approx(0)
    assert losses.importance_cv2(gates) == pytest.approx(np.var(gates) / np.mean(gates) ** 2)
    assert losses.importance_cv2(gates) > 1


def test_a_balanced_router_is_within_chance_at_every_scope() -> None:
    """Sure or undecided: 99 of 100 uniform routers are below the upper end, at any batch size."""
    rng = np.random.default_rng(6)
    E, k, F, T = 8, 2, 6, 24
    marks = dict.fromkeys(("switch_loss", "switch_loss_micro", "switch_loss_global", "scope_gap",
                           "switch_loss_sequence", "switch_loss_k"), 0)  # fmt: skip
    for trial in range(60):
        z = rng.normal(size=(F * T, E)) * (0.1 if trial % 2 else 6)
        chosen = np.zeros((F * T, E), bool)
        np.put_along_axis(chosen, np.argsort(-z, 1)[:, :k], True, 1)
        p = probabilities(z, "softmax")
        by_F = chosen.reshape(F, T, E), p.reshape(F, T, E)
        known = Evidence(
            experts=E,
            outputs=E,
            top_k=k,
            tokens=F * T,
            counts_E=chosen.sum(0),
            prob_V=p.mean(0),
            counts_FE=by_F[0].sum(1),
            prob_FV=by_F[1].mean(1),
            tokens_F=np.full(F, T),
            step_F=np.arange(F) // 3,
            chosen_TV=chosen,
            prob_TV=p,
            sequence_T=np.repeat(np.arange(F), T),
        )
        for name in marks:
            marks[name] += measure(METRICS[name], known).beyond != ""
    assert max(marks.values()) <= 3, marks
