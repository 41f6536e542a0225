"""How often the experts of a layer are among m that were predicted: recall, for every m.

What is fitted (popularity, transitions) is fitted on the first part of the tokens and scored on the
rest, never on itself. The conversation's prefix is what came before the token in its sequence.

Legend: T tokens, E experts, k choices per token, m experts fetched.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.accesses import Ints
from moe_lens.metrics.cache import popularity
from moe_lens.metrics.tokens import Tokens

PREDICTORS = ("popularity", "prefix", "last_layer")
_CELLS = 2_000_000
"""Tokens x experts that are scored at a time."""


def recall(tokens: Tokens, first: int, before: Tokens | None = None) -> pd.DataFrame:
    """Share of a layer's choices among the m experts that each predictor names.

    - popularity: the m most chosen before `first`.
    - prefix: the m most chosen by the earlier tokens of the same sequence.
    - last_layer: the m largest sums of P(expert | expert chosen in the last layer), from the counts
      of such pairs before `first`; of a token's k choices in both layers every pair counts.

    Ties go to the more popular, then to the lower id.

    Args:
        tokens: Of the layer that is predicted.
        first: Number of the first token that is scored; what is before it is fitted on.
        before: The same tokens in the layer before, if there is one.

    Returns:
        A row for m = 1 … E: `size` (m), a column a predictor (0 to 1), `chance` (m / E). Null where
        there was nothing to fit on, or nothing to predict from.
    """
    experts = tokens.experts
    sizes = np.arange(1, experts + 1)
    out = pd.DataFrame({"size": sizes})
    for name in PREDICTORS:
        placed = places(name, tokens, first, before)
        found = np.bincount(placed, minlength=experts).cumsum()
        out[name] = found / (len(placed) or np.nan)
    return out.assign(chance=sizes / experts)


def places(predictor: str, tokens: Tokens, first: int, before: Tokens | None = None) -> Ints:
    """Where each choice from token `first` on stands in the predictor's order, 0 the first.

    Token after token, as `recall` says; none where there was nothing to fit on, or to predict from.
    """
    scored = tokens.since(first)
    fitted = tokens.until(first)
    place_E = popularity(fitted.chosen.expert_ids, tokens.experts)
    order = np.argsort(place_E)
    if predictor == "prefix":
        return _ranks(scored.chosen.touched(), _prefixes(tokens)[first:], order)
    if first > 0 and predictor == "popularity":
        return place_E[scored.chosen.expert_ids]
    if first > 0 and predictor == "last_layer" and before is not None:
        return _by_last_layer(fitted, scored, before, order)
    return np.empty(0, np.int64)


def transitions(before: Tokens, tokens: Tokens) -> NDArray[np.float64]:
    """`[E of the layer before, E]`: P(expert | expert in the layer before), over tokens of both."""
    a, b = _same(before, tokens)
    pairs = before.chosen.touched()[a].T.astype(np.float64) @ tokens.chosen.touched()[b]
    total = pairs.sum(axis=1, keepdims=True)
    probs: NDArray[np.float64] = np.divide(pairs, total, out=np.zeros_like(pairs), where=total > 0)
    return probs


def _by_last_layer(fitted: Tokens, scored: Tokens, before: Tokens, order: Ints) -> Ints:
    probs = transitions(before, fitted)
    a, b = _same(before, scored)
    rows = scored.chosen.touched()[b]
    scores = before.chosen.touched()[a].astype(np.float64) @ probs
    return _ranks(rows, scores, order)


def _same(before: Tokens, tokens: Tokens) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the tokens that both layers saw stand in each."""
    _, a, b = np.intersect1d(before.nth, tokens.nth, assume_unique=True, return_indices=True)
    return a, b


def _prefixes(tokens: Tokens) -> NDArray[np.int32]:
    """`[T, E]`: choices of each expert by the earlier tokens of the same sequence."""
    touched = tokens.chosen.touched()
    out = np.zeros(touched.shape, np.int32)
    for begin, length in zip(tokens.begins(), tokens.lengths(), strict=True):
        end = begin + length
        out[begin + 1 : end] = np.cumsum(touched[begin : end - 1], axis=0)
    return out


def _ranks(
    chosen_TE: NDArray[np.bool_], scores_TE: NDArray[np.integer | np.floating], order: Ints
) -> Ints:
    """Place of each choice among all experts by score, 0 the highest; ties in this order."""
    found = [np.empty(0, np.int64)]
    step = max(1, _CELLS // max(len(order), 1))
    for begin in range(0, len(chosen_TE), step):
        part = slice(begin, begin + step)
        ranked = np.argsort(-scores_TE[part][:, order], axis=1, kind="stable")
        in_order = np.take_along_axis(chosen_TE[part][:, order], ranked, axis=1)
        found.append(np.nonzero(in_order)[1])
    return np.concatenate(found)
