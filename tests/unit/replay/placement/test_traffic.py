"""What is sent, against loops over tokens, and against the expected value of uniform routing."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.replay.placement.methods import place
from moe_lens.replay.placement.plan import slots_of
from moe_lens.replay.placement.traffic import leaving, sent, sources


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 4))
def test_against_plain_loops(seed: int, tokens: int, top_k: int) -> None:
    random = np.random.default_rng(seed)
    plan = place("eplb", random.integers(1, 9, (1, 8)), (0,), ranks=4, replicas=4, nodes=2)
    ids_TK = random.integers(-1, 8, (tokens, top_k)).astype(np.int32)
    slot_TK = slots_of(ids_TK, plan.of_layer(0, 8), 8)
    source_T = sources(tokens, 4)
    assert source_T.tolist() == [t * 4 // tokens for t in range(tokens)]
    for nodes, many in ((False, 4), (True, 2)):
        once, each = np.zeros((many, many), int), np.zeros((many, many), int)
        for t, slots in enumerate(slot_TK.tolist()):
            home = int(source_T[t]) * many // 4
            there = [slot // (12 // many) for slot in slots if slot >= 0]
            for to in there:
                each[home, to] += 1
            for to in set(there):
                once[home, to] += 1
        made = sent(slot_TK, source_T, plan)
        found = (made.nodes_NN, made.choices_NN) if nodes else (made.ranks_RR, made.choices_RR)
        assert [of.tolist() for of in found] == [once.tolist(), each.tolist()]
        away = sum(once[a, b] for a in range(many) for b in range(many) if a != b)
        assert leaving(found[0]) == away


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "ranks_per_token"),
    [(256, 8, 8, 5.295), (256, 8, 32, 7.27), (128, 8, 8, 5.34), (64, 8, 8, 5.43), (8, 2, 8, 2.0)],
)
def test_ranks_of_a_token_under_uniform_routing(
    experts: int, top_k: int, ranks: int, ranks_per_token: float
) -> None:
    """R (1 - C(E - E/R, k) / C(E, k)), of which 1 / R is at home."""
    here = comb(experts - experts // ranks, top_k) / comb(experts, top_k)
    assert ranks * (1 - here) == pytest.approx(ranks_per_token, abs=5e-3)
    random = np.random.default_rng(0)
    tokens = 4096
    ids_TK = random.random((tokens, experts)).argsort(1)[:, :top_k].astype(np.int32)
    plan = place("contiguous", np.ones((1, experts)), (0,), ranks=ranks)
    slot_TK = slots_of(ids_TK, plan.slots_LP[0], experts)
    made = sent(slot_TK, sources(tokens, ranks), plan).ranks_RR
    assert made.sum() / tokens == pytest.approx(ranks * (1 - here), rel=0.01)
    assert leaving(made) / made.sum() == pytest.approx(1 - 1 / ranks, rel=0.02)
