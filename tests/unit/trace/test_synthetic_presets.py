"""The four kinds of popularity over time can be told apart, by a wide margin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moe_lens.trace.synthetic import Spec, balanced, bursty, counts, drifting, stationary

R, WINDOW = 8, 32


def packed(load_E: np.ndarray) -> np.ndarray:
    """Experts on R ranks, as many on each, the most loaded first onto the emptiest."""
    room = len(load_E) // R
    held, on, where = np.zeros(R), np.zeros(R, int), np.zeros(len(load_E), int)
    for e in np.argsort(-load_E):
        r = min((r for r in range(R) if on[r] < room), key=lambda r: held[r])
        where[e], held[r], on[r] = r, held[r] + load_E[e], on[r] + 1
    return where


def imbalance(counts_FE: np.ndarray, where: np.ndarray) -> float:
    """Largest load of a rank over the mean, averaged over forwards."""
    of_ranks = np.stack([counts_FE[:, where == r].sum(1) for r in range(R)], 1)
    return float((of_ranks.max(1) / of_ranks.mean(1)).mean())


def figures(counts_FE: np.ndarray) -> tuple[float, float, float, float]:
    """(as it lies, fitted to the past, fitted to the forward itself, hottest expert of the run)."""
    later = counts_FE[WINDOW:]
    straight = np.arange(counts_FE.shape[1]) * R // counts_FE.shape[1]
    own = np.mean([imbalance(x[None], packed(x)) for x in later[::8]])
    hottest = counts_FE.sum(0).max() / counts_FE.sum(0).mean()
    fitted = packed(counts_FE[:WINDOW].sum(0))
    return imbalance(later, straight), imbalance(later, fitted), float(own), float(hottest)


KINDS = {
    #             as it lies, fitted to the past, to itself, hottest of the run: (low, high) each
    stationary: ((1.3, 3.0), (1.0, 1.2), (1.0, 1.2), (5.0, 8.0)),
    drifting: ((1.4, 3.0), (1.4, 3.0), (1.0, 1.2), (1.1, 2.5)),
    bursty: ((1.6, 1.8), (1.6, 1.8), (1.5, 1.7), (1.0, 1.1)),
    balanced: ((1.0, 1.1), (1.0, 1.1), (1.0, 1.1), (1.0, 1.05)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
def test_each_kind_is_what_it_is_called(kind: Callable[..., Spec], seed: int) -> None:
    counts_FLE = counts(kind(seed=seed))
    for layer in range(counts_FLE.shape[1]):
        for value, (low, high) in zip(figures(counts_FLE[:, layer]), KINDS[kind], strict=True):
            assert low <= value < high


def test_any_field_can_be_changed() -> None:
    assert drifting(steps=8, forwards=2).drift.at == (4, 8, 12)  # type: ignore[union-attr]
    serving = drifting(steps=2, phases=("serve",), decode=5)  # twelve forwards
    assert serving.drift.at == (4, 8)  # type: ignore[union-attr]
    assert drifting(drift=None).drift is None
    assert drifting(steps=1).drift.at == (4,)  # type: ignore[union-attr]
    assert stationary(skew=0.5, layers=1).skew == 0.5
    assert bursty(burst=None).burst is None
