"""Selection biases: against loops over top-k, and the balancing that moves them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.metrics import bias
from moe_lens.metrics.bias import Ranking
from moe_lens.metrics.catalogue import METRICS, measure, metrics
from moe_lens.metrics.evidence import Evidence

assert "bias_changed" in metrics()


def score(z: float, kind: str) -> float:
    """One at a time; a softmax without its divisor, which all outputs of a token share."""
    return {
        "logits": lambda: z,
        "softmax": lambda: float(np.exp(z)),
        "sigmoid": lambda: float(1 / (1 + np.exp(-z))),
        "sqrtsoftplus": lambda: float(np.sqrt(np.log1p(np.exp(z)))),
    }[kind]()


def chosen(z: list[float], b: list[float], k: int, rank: Ranking) -> set[int]:
    """What a router with the bias b chooses, as its papers write it."""
    s = [score(x, rank.score) + y for x, y in zip(z, b, strict=True)]
    allowed = list(range(len(s)))
    if rank.groups and rank.top_groups:
        size = len(s) // rank.groups
        members = [allowed[g * size : (g + 1) * size] for g in range(rank.groups)]
        value = [sum(sorted((s[e] for e in m), reverse=True)[: rank.best]) for m in members]
        best = sorted(range(rank.groups), key=lambda g: -value[g])[: rank.top_groups]
        allowed = [e for g in best for e in members[g]]
    return set(sorted(allowed, key=lambda e: -s[e])[:k])


RANKINGS = [
    Ranking("sigmoid"),
    Ranking("softmax"),
    Ranking("sqrtsoftplus"),
    Ranking("logits"),
    Ranking("sigmoid", 4, 2, 2),
    Ranking("softmax", 2, 1, 1),
    Ranking("sqrtsoftplus", 4, 3, 2),
]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(RANKINGS), st.integers(1, 4))
def test_changes_are_those_of_a_loop(seed: int, rank: Ranking, k: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (30, 8))
    b = rng.normal(0, 0.3, 8)
    ids = [chosen(row.tolist(), b.tolist(), k, rank) for row in z]
    marked = np.array([[e in each for e in range(8)] for each in ids])
    wanted = [
        chosen(row.tolist(), [0.0] * 8, k, rank) != each for row, each in zip(z, ids, strict=True)
    ]
    assert bias.changed(z, marked, rank).tolist() == wanted
    without = [chosen(row.tolist(), [0.0] * 8, k, rank) for row in z]
    marked = np.array([[e in each for e in range(8)] for each in without])
    assert not bias.changed(z, marked, rank).any()


def bf16(x: np.ndarray) -> np.ndarray:
    from moe_lens.trace.rounding import BF16_BITS, keep_mantissa

    return keep_mantissa(x.astype(np.float32), BF16_BITS).astype(float)


@pytest.mark.parametrize("rank", RANKINGS, ids=str)
def test_what_rounding_decides_is_within_the_null(rank: Ranking) -> None:
    """Pitfalls 13, 14: logits are recorded in bfloat16, and no bias moved anything.

    Every choice that rounded logits do not explain is one that is called unsure, and ties, of which
    rounding makes many, are no change.
    """
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2, (3000, 8))
    ids = [chosen(row.tolist(), [0.0] * 8, 2, rank) for row in z]
    marked = np.array([[e in each for e in range(8)] for each in ids])
    rounded = bf16(z)
    changed, unsure = (f(rounded, marked, rank) for f in (bias.changed, bias.unsure))
    assert (unsure | ~changed).all()
    assert 0 < unsure.mean() < 0.05
    found = measure(
        METRICS["bias_changed"],
        Evidence(experts=8, outputs=8, logits_TV=rounded, chosen_TV=marked, ranking=rank),
    )
    assert found.value <= unsure.mean()
    assert found.beyond == ""


def test_ties_are_no_change() -> None:
    """Pitfall 13: of equal scores a top-k takes any, another one on another device."""
    z = np.zeros((2, 4))
    for ids in ([0, 1], [2, 3], [0, 3]):
        marked = np.isin(np.arange(4), ids)[None].repeat(2, 0)
        assert not bias.changed(z, marked, Ranking("sigmoid")).any()
        assert bias.unsure(z, marked, Ranking("sigmoid")).all()
    groups = np.array([[False, False, True, True], [True, True, False, False]])
    assert not bias.changed(z, groups, Ranking("sigmoid", 2, 1, 2)).any()
    split = np.array([[False, True, True, False]])  # of two groups, where one may be used
    assert bias.changed(z[:1], split, Ranking("sigmoid", 2, 1, 2)).all()


def test_a_planted_bias_is_beyond_rounding() -> None:
    rng = np.random.default_rng(0)
    z = bf16(rng.normal(0, 1, (2000, 8)))
    shares = []
    for size in (0.0, 0.1, 0.3):
        b = size * np.linspace(-1, 1, 8)
        ids = np.argsort(-(1 / (1 + np.exp(-z)) + b), axis=1, kind="stable")[:, :2]
        marked = np.zeros((2000, 8), bool)
        np.put_along_axis(marked, ids, True, 1)
        known = Evidence(
            experts=8, outputs=8, logits_TV=z, chosen_TV=marked, ranking=Ranking("sigmoid")
        )
        found = measure(METRICS["bias_changed"], known)
        assert found.beyond == ("high" if size else "")
        shares.append(found.value)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[2] > 0.4


def test_edges_of_choice() -> None:
    z = np.array([[1.0, 2.0, -np.inf], [3.0, 1.0, 2.0]])
    everything = np.ones((2, 3), bool)
    assert not bias.changed(z, everything, Ranking("logits")).any()
    assert not bias.unsure(z, everything, Ranking("logits")).any()
    nothing = np.zeros((2, 3), bool)
    assert not bias.changed(z, nothing, Ranking("logits")).any()
    assert not bias.unsure(z, nothing, Ranking("logits")).any()
    masked = np.array([[True, True, False], [True, False, True]])
    assert not bias.changed(z, masked, Ranking("sigmoid")).any()
    assert not bias.unsure(z, masked, Ranking("sigmoid")).any()
    one = Evidence(experts=1, outputs=1, logits_TV=np.zeros((3, 1)), ranking=Ranking("sigmoid"),
                   chosen_TV=np.ones((3, 1), bool))  # fmt: skip
    assert measure(METRICS["bias_changed"], one).value == 0
    none = Evidence(experts=2, outputs=2, logits_TV=np.zeros((0, 2)), ranking=Ranking("sigmoid"),
                    chosen_TV=np.ones((0, 2), bool))  # fmt: skip
    assert measure(METRICS["bias_changed"], none).lacks


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        ("sigmoid+bias", Ranking("sigmoid")),
        ("logits+bias", Ranking("logits")),
        ("sigmoid+bias, groups by top-2", Ranking("sigmoid", 4, 2, 2)),
        ("softmax+bias, groups by top-1", Ranking("softmax", 4, 2, 1)),
        ("softmax, groups by top-1", None),
        ("logits", None),
        (None, None),
    ],
)
def test_what_a_trace_says(selection: str | None, wanted: Ranking | None) -> None:
    assert bias.ranking(selection, 4, 2) == wanted


# ---- the bias itself ----------------------------------------------------------------------------


def test_spread_and_flips_by_hand() -> None:
    b = [[0.0, 0.0, 0.0], [0.1, -0.1, 0.0], [0.2, 0.0, 0.0], [0.1, -0.1, 0.0]]
    assert bias.spread(b) == pytest.approx([0, 0.2, 0.2, 0.2])
    # Steps + + -, - + -: of four pairs three go back. The third expert does not move.
    assert bias.sign_flip_rate(b) == pytest.approx(3 / 4)
    for too_few in (b[:2], [[1.0, 2.0]] * 5, np.zeros((0, 3))):
        assert np.isnan(bias.sign_flip_rate(too_few))
    with pytest.raises(ValueError, match=r"\[S, E\], a row for each step; got shape \(3,\)"):
        bias.spread([0.0, 1.0, 2.0])


def test_flips_of_noise_are_a_half() -> None:
    steps = np.random.default_rng(0).choice([-1e-3, 1e-3], (400, 16))
    assert bias.sign_flip_rate(steps.cumsum(0)) == pytest.approx(0.5, abs=3 * 0.5 / 80)


def balanced(u: float, steps: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Loss-free balancing of a router with preferences: b_i += u sign(mean - n_i), every step."""
    rng = np.random.default_rng(1)
    prefers = rng.normal(0, 0.7, 16)
    b, out, loads = np.zeros(16), [], []
    for _ in range(steps):
        s = 1 / (1 + np.exp(-(prefers + rng.normal(0, 1, (2048, 16)))))
        n = np.bincount(np.argsort(-(s + b), axis=1)[:, :4].ravel(), minlength=16)
        b = b + u * np.sign(n.mean() - n)
        out.append(b)
        loads.append(n)
    return np.array(out), np.array(loads)


def test_telemetry_tells_slow_from_right_from_oscillating() -> None:
    """Fig. 4 of the paper: u = 1e-4 is slow, 1e-2 oscillates, 1e-3 is right."""
    flips, spreads, imbalance = {}, {}, {}
    for u in (1e-4, 1e-3, 3e-2):
        b, loads = balanced(u)
        flips[u], spreads[u] = bias.sign_flip_rate(b[-50:]), bias.spread(b)
        imbalance[u] = float((loads[-50:].max(1) / loads[-50:].mean(1)).mean())
    assert flips[1e-4] < 0.1 < flips[1e-3] < 0.7 < flips[3e-2]
    # On its way the spread grows by 2 u a step.
    assert np.diff(spreads[1e-4]) == pytest.approx(np.full(149, 2e-4))
    assert imbalance[1e-3] < min(imbalance[1e-4], imbalance[3e-2])
