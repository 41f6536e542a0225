"""The choices of some of a run's tokens, layer by layer: what says who is sent where.

T tokens, K choices of a token, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.replay.choose import Forward, evenly
from moe_lens.replay.index import Index
from moe_lens.replay.placement.counts import Counts, rank_forwards
from moe_lens.replay.routing import Ids, Routed, read

TOKENS = 20_000
"""Tokens of each layer that are looked at, of forwards evenly spread, if nobody says."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """Tokens of one layer, of whole forwards.

    Attributes:
        expert_ids_TK: int32; -1: no expert computed this choice.
        forward_T: The forward of each token, numbered from 0 in time.
        rank_T: The rank that recorded it.
    """

    expert_ids_TK: Ids
    forward_T: Ints
    rank_T: Ints


def choices_of(
    index: Index | None, counts: Counts, tokens: int = TOKENS
) -> dict[int, Choices] | None:
    """Choices by layer; None where these forwards have no rows per token.

    Args:
        index: Of `counts.rows_of`.
        counts: Of the forwards that may be looked at.
        tokens: At most about so many of each layer, of forwards evenly spread.

    Raises:
        TraceError: A segment cannot be read.
    """
    if index is None:
        return None
    by_site: dict[tuple[int, int], list[Forward]] = defaultdict(list)
    for forward in rank_forwards(index, set(counts.forwards)):
        by_site[forward.step, forward.forward].append(forward)
    chosen = _within([by_site[site] for site in sorted(by_site)], tokens)
    if not chosen:
        return None
    at = {(of[0].step, of[0].forward): i for i, of in enumerate(chosen)}
    in_turn = sorted((f for of_ranks in chosen for f in of_ranks), key=lambda f: f.key)
    parts: dict[int, list[tuple[int, Routed]]] = defaultdict(list)
    for found in read(index, list(counts.layers), in_turn, lists=("expert_ids", "dropped")):
        for routed in found:
            parts[routed.layer].append((at[routed.step, routed.forward], routed))
    # The tokens of a forward lie together, rank after rank: they were read rank by rank.
    return {layer: _joined(sorted(of, key=lambda x: x[0])) for layer, of in parts.items()}


def _within(forwards: list[list[Forward]], tokens: int) -> list[list[Forward]]:
    """Forwards evenly spread, each as what every rank did, of about `tokens` tokens together."""
    if not forwards:
        return []
    mean = sum(f.tokens for of_ranks in forwards for f in of_ranks) / len(forwards)
    most = max(1, min(len(forwards), round(tokens / max(mean, 1))))
    return [forwards[i] for i in evenly(len(forwards), most)]


def _joined(of: list[tuple[int, Routed]]) -> Choices:
    width = max(routed.expert_ids_TK.shape[1] for _, routed in of)
    return Choices(
        np.concatenate([_kept(routed, width) for _, routed in of]),
        np.concatenate([np.full(routed.tokens, forward) for forward, routed in of]),
        np.concatenate([np.full(routed.tokens, routed.rank) for _, routed in of]),
    )


def _kept(routed: Routed, width: int) -> Ids:
    ids_TK = np.where(routed.dropped_TK, -1, routed.expert_ids_TK).astype(np.int32)
    return np.pad(ids_TK, ((0, 0), (0, width - ids_TK.shape[1])), constant_values=-1)


def together_of(choices: dict[int, Choices] | None, counts: Counts) -> NDArray[np.float64] | None:
    """How often a token chose both of two experts [L, E, E], a token's own pairs included."""
    if choices is None:
        return None
    together_LEE = np.zeros((len(counts.layers), counts.experts, counts.experts))
    for i, layer in enumerate(counts.layers):
        if layer in choices:
            together_LEE[i] = _pairs(choices[layer].expert_ids_TK, counts.experts)
    return together_LEE


def _pairs(ids_TK: NDArray[Any], experts: int) -> Ints:
    # A place beside the experts takes what is no choice.
    ids_TK = np.where(ids_TK < 0, experts, ids_TK).astype(np.int64)
    pair_TKK = ids_TK[:, :, None] * (experts + 1) + ids_TK[:, None, :]
    counted = np.bincount(pair_TKK.ravel(), minlength=(experts + 1) ** 2)
    return counted.reshape(experts + 1, experts + 1)[:experts, :experts]
