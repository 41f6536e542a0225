"""What tokens do between two layers: the tables and draws behind the metrics of transitions.

Legend: N tokens, K choices of a token, C all choices, E experts, B experts of the layer before,
R the tokens as they are (0), then shuffled between the layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lens.metrics import prefetch
from moe_lens.metrics.accesses import Accesses
from moe_lens.metrics.chance import FORWARD_DRAWS, SEED, Floats, Ints
from moe_lens.metrics.tokens import Tokens


def transition_matrix(
    before_NK: Ints, ids_NK: Ints, experts: int, *, same_rank: bool = False
) -> Floats:
    """`[B, E]`: of the choices that follow a choice of each expert, the share on each expert.

    Of all pairs of a choice with one of the next layer. Rows sum to 1, or to 0 where an expert was
    not chosen. Times k it is P(j chosen | i chosen in the layer before), by chance F_j.

    Args:
        before_NK: Choices in the layer before, best first; -1: none.
        ids_NK: The same tokens' choices.
        experts: E.
        same_rank: Pair only the first choice with the first, and so on, as OLMoE's release does.
    """
    if same_rank:
        shared = min(before_NK.shape[1], ids_NK.shape[1])
        pairs_BE = _counts(before_NK[:, :shared].ravel(), ids_NK[:, :shared].ravel(), experts)
        return np.asarray(pairs_BE / np.maximum(pairs_BE.sum(1, keepdims=True), 1))
    return prefetch.transitions(_tokens(before_NK), _tokens(ids_NK, experts=experts))


@dataclass(frozen=True)
class Moves:
    """First choice to first choice, as it is (0) and with the tokens shuffled.

    Attributes:
        uncertainty_R: I(before; next) / H(next); NaN where all go to one expert.
        affinity_R: Share of tokens that go where most tokens of their expert go.
    """

    uncertainty_R: Floats
    affinity_R: Floats


def moves(before_NK: Ints, ids_NK: Ints) -> Moves:
    """Of the tokens that have a first choice in both layers."""
    before_N, ids_N = _firsts(before_NK, ids_NK)
    rng = np.random.default_rng(SEED)
    orders = [ids_N, *(rng.permutation(ids_N) for _ in range(FORWARD_DRAWS))]
    n = max(len(ids_N), 1)
    of_before, of_next = _entropy(np.bincount(before_N)), _entropy(np.bincount(ids_N))
    uncertainty_R, affinity_R = np.empty((2, len(orders)))
    for r, order_N in enumerate(orders):
        counts_BE = _counts(before_N, order_N)
        shared = of_before + of_next - _entropy(counts_BE)
        uncertainty_R[r] = shared / of_next if of_next else math.nan
        affinity_R[r] = counts_BE.max(1).sum() / n if len(ids_N) else math.nan
    return Moves(uncertainty_R, affinity_R)


@dataclass(frozen=True)
class Prefetched:
    """What k prefetched experts are worth, by predictor; NaN where nothing could be scored.

    Attributes:
        recall: Share of choices that are among them.
        exact: Share of tokens all of whose choices are.
    """

    recall: dict[str, float]
    exact: dict[str, float]


def prefetched(
    before_NK: Ints, ids_NK: Ints, sequence_N: Ints, experts: int, top_k: int
) -> Prefetched:
    """By popularity, and by the experts of the layer before: see `prefetch.recall`.

    Fitted on the first half of the sequences, scored on the second.
    """
    before, tokens = _tokens(before_NK), _tokens(ids_NK, sequence_N, experts)
    first = tokens.half()
    scored = tokens.since(first).chosen
    some_N = np.diff(scored.starts) > 0
    out = Prefetched({}, {})
    for predictor in ("popularity", "last_layer"):
        missed_C = prefetch.places(predictor, tokens, first, before) >= top_k
        out.recall[predictor] = out.exact[predictor] = math.nan
        if len(missed_C):
            missed_N = np.bincount(scored.of_requests(), missed_C, minlength=len(scored)) > 0
            out.recall[predictor] = float(1 - missed_C.mean())
            out.exact[predictor] = float(1 - missed_N[some_N].mean())
    return out


def _firsts(before_NK: Ints, ids_NK: Ints) -> tuple[Ints, Ints]:
    if not before_NK.shape[1] or not ids_NK.shape[1]:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    there_N = (before_NK[:, 0] >= 0) & (ids_NK[:, 0] >= 0)
    return before_NK[there_N, 0], ids_NK[there_N, 0]


def _counts(before_N: Ints, ids_N: Ints, experts: int = 1) -> Ints:
    """`[B, E]`: how often each pair occurs; E at least the experts given."""
    there_N = (before_N >= 0) & (ids_N >= 0)
    before_N, ids_N = before_N[there_N], ids_N[there_N]
    size = max(int(ids_N.max(initial=-1)) + 1, experts)
    rows = int(before_N.max(initial=-1)) + 1
    return np.bincount(before_N * size + ids_N, minlength=rows * size).reshape(rows, size)


def _entropy(counts: Ints) -> float:
    """Nats."""
    n = counts[counts > 0]
    if len(n) < 2:
        return 0.0
    total = n.sum()
    return float(np.log(total) - n @ np.log(n) / total)


def _tokens(ids_NK: Ints, sequence_N: Ints | None = None, experts: int = 0) -> Tokens:
    """As prefetching takes them; E at least the experts given."""
    n = len(ids_NK)
    in_order_NK = np.sort(ids_NK, axis=1)
    starts = np.append(0, (ids_NK >= 0).sum(1).cumsum())
    size = max(int(ids_NK.max(initial=-1)) + 1, experts)
    chosen = Accesses(size, in_order_NK[in_order_NK >= 0], starts)
    none: Any = np.zeros(n, np.int64)
    sequences = none if sequence_N is None else sequence_N
    return Tokens(chosen, np.arange(n), sequences, none, none, np.full(n, "", object))
