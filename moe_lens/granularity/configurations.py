"""How many sets of k experts does a router really use, of the C(m, k) that there are?

A linear router of d inputs reaches few sets where d is small: it cuts space by planes through one
point. The paper's lower bound needs d of about C k (log m)^2.

Tensor names carry their shape: N tokens, E experts, D hidden, K choices, M how often a set is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_lens.granularity.draws import generator, inputs
from moe_lens.metrics import richness
from moe_lens.metrics.subsets import chosen_sets, reachable

_CHUNK = 65_536


@dataclass(frozen=True)
class Realised:
    """Sets of experts that a sample of tokens chose.

    Attributes:
        tokens: n.
        used: Different sets that were seen.
        coverage: Probability that the next token's set is one of them (Good-Turing).
        at_least: Sets in use at least, unseen ones too (Chao 1984).
        possible_bits: log2 C(m, k).
    """

    tokens: int
    used: int
    coverage: float
    at_least: float
    possible_bits: float

    @property
    def share(self) -> float:
        """Used sets over possible ones."""
        return float(self.used * 2.0**-self.possible_bits)


def realised(expert_ids_NK: Tensor, experts: int) -> Realised:
    """Count the sets of a router's choices; the order of a token's choices does not matter.

    Args:
        expert_ids_NK: int64, different experts in each row.
        experts: m.
    """
    ids_NK = expert_ids_NK.cpu().numpy()
    if experts <= 63:  # a set is one number, which is quicker to sort than a row
        times_M = richness.tally(np.bitwise_or.reduce(1 << ids_NK, axis=1))
    else:
        times_M = chosen_sets(ids_NK)
    possible = reachable(experts, ids_NK.shape[1])
    return Realised(
        tokens=len(ids_NK),
        used=int(richness.distinct(times_M)),
        coverage=float(richness.coverage(times_M)),
        at_least=min(float(richness.chao1(times_M)), possible),  # an estimate may go beyond
        possible_bits=math.log2(possible),
    )


def of_random_router(experts: int, top_k: int, hidden: int, *, tokens: int, seed: int) -> Realised:
    """The same of a router of normal weights, without a bias, on tokens ~ N(0, I)."""
    gate_ED = torch.randn(experts, hidden, generator=generator(seed, "random router", hidden))
    drawn = generator(seed, "routing", hidden)
    chosen = []
    for first in range(0, tokens, _CHUNK):
        x_ND = inputs(min(_CHUNK, tokens - first), hidden, drawn, "cpu")
        chosen.append((x_ND @ gate_ED.T).topk(top_k, dim=1).indices)
    return realised(torch.cat(chosen), experts)
