"""Sets in use against Python's own, and how they grow with the inputs' dimensions."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median

import pytest
import torch

from moe_lens.granularity.configurations import of_random_router, realised
from moe_lens.granularity.draws import generator
from moe_lens.granularity.partition import on_circle


@pytest.mark.parametrize("experts", [5, 63, 66, 200])
def test_sets_are_counted_whatever_their_order(experts: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    scores = torch.randn(3_000, experts, generator=drawn)
    scores[:, -4:] += 6  # few sets, met often
    ids_NK = scores.topk(3, dim=1).indices
    found = realised(ids_NK, experts)
    sets = [frozenset(row) for row in ids_NK.tolist()]
    assert found.used == len(set(sets)) < 3_000
    assert found.tokens == 3_000
    once = sum(n == 1 for n in Counter(sets).values())
    assert found.coverage == pytest.approx(1 - once / 3_000)
    assert found.possible_bits == pytest.approx(math.log2(math.comb(experts, 3)))
    assert found.share == pytest.approx(found.used / math.comb(experts, 3))
    assert found.at_least >= found.used


def test_no_more_sets_are_in_use_than_there_are() -> None:
    pairs = [[a, b] for a in range(4) for b in range(a)]
    found = realised(torch.tensor([pairs[0], *pairs]), 4)  # five of six seen once: Chao says 11
    assert (found.used, found.at_least) == (6, 6)


@pytest.mark.parametrize(("hidden", "sets"), [(2, 24), (4, 428), (8, 3_874), (32, 12_067)])
def test_dimensions_bound_the_sets_in_use(hidden: int, sets: int) -> None:
    """16 experts, 8 a token: so many of the 12,870 sets among 200,000 tokens, give or take 10 %."""
    used = [of_random_router(16, 8, hidden, tokens=200_000, seed=seed).used for seed in range(7)]
    assert median(used) == pytest.approx(sets, rel=0.1)


def test_in_the_plane_a_sample_finds_the_arcs() -> None:
    for seed in range(4):
        gate_ED = torch.randn(16, 2, generator=generator(seed, "random router", 2))
        arcs = on_circle(gate_ED.double().numpy(), 8)
        wide = sum(to - start > 1e-3 for start, to, _ in arcs)
        used = of_random_router(16, 8, 2, tokens=100_000, seed=seed).used
        assert wide <= used <= len(arcs)
