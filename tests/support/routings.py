"""Routing for tests: every token's choices differ, some slots do not run, some experts are hot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Routing:
    """int32 ids [T, K] among E experts, M runners-up [T, M], and float32 priorities of both."""

    ids_TK: Tensor
    experts: int
    next_ids_TM: Tensor
    priority_TK: Tensor
    next_priority_TM: Tensor


def routing(
    seed: int,
    tokens: int,
    experts: int,
    top_k: int,
    *,
    runners_up: int = 0,
    none: float = 0.1,
    skew: float = 0.0,
    levels: int = 0,
) -> Routing:
    """Random routing; `skew` makes low experts hot, `levels` makes priorities tie."""
    random = np.random.default_rng(seed)
    score_TE = random.gumbel(size=(tokens, experts)) - skew * np.log1p(np.arange(experts))
    order_TE = np.argsort(-score_TE, axis=1).astype(np.int32)
    both_TX = order_TE[:, : top_k + runners_up].copy()
    both_TX[random.random(both_TX.shape) < none] = -1
    priority_TX = random.normal(size=both_TX.shape).astype(np.float32)
    if levels:
        priority_TX = np.trunc(priority_TX * levels) / np.float32(levels)  # has zeros of both signs
        priority_TX[random.random(both_TX.shape) < 0.05] = np.inf
    both, priority = torch.from_numpy(both_TX), torch.from_numpy(priority_TX.astype(np.float32))
    return Routing(
        both[:, :top_k].contiguous(),
        experts,
        both[:, top_k:].contiguous(),
        priority[:, :top_k].contiguous(),
        priority[:, top_k:].contiguous(),
    )


@st.composite
def routings(draw: st.DrawFn, most_tokens: int = 60) -> Routing:
    """Any routing, down to no token and one expert."""
    experts = draw(st.sampled_from([1, 2, 3, 8, 33, 64]))
    top_k = draw(st.integers(1, min(experts, 9)))
    return routing(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(0, 3) | st.integers(0, most_tokens)),
        experts,
        top_k,
        runners_up=draw(st.integers(0, min(experts - top_k, 4))),
        none=draw(st.sampled_from([0.0, 0.1, 1.0])),
        skew=draw(st.sampled_from([0.0, 1.0, 50.0])),
        levels=draw(st.sampled_from([0, 1, 3])),
    )
