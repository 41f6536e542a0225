"""How a token's routing changes where the same content stands in another order.

Two tokens of a pair of sequences are the same content (`alignment`), and their choices are
compared. Three references stand beside them: two sequences that are the same throughout, whose
difference must be 0; tokens of other sequences that only have the same id; and any two tokens of
the layer. So what a token says about its experts falls into three parts: its id, its content (what
moves along with it), and the order.

Legend: N tokens of a layer, P aligned pairs of tokens (a in one sequence, b in the other), K
choices of a token, X token ids, Y ids within a pair's sequences, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.metrics.by_tag import tally
from moe_lens.metrics.by_token import octave
from moe_lens.metrics.chance import Floats, Ints

CHANGES = ("overlap", "set_changed", "first_changed", "weight_change")


@dataclass(frozen=True)
class Routed:
    """What a layer's router chose.

    Attributes:
        ids_NK: Choices, -1: none; the largest gate weight first where `ranked`.
        weights_NK: Their gate weights, 0 where there is none; None: not kept.
        ranked: The first choice is the router's first.
        token_id_N: Vocabulary ids; None: not kept.
        pair_N: Number of the pair that the token's sequence belongs to; -1: none.
        experts: E.
    """

    ids_NK: Ints
    weights_NK: Floats | None
    ranked: bool
    token_id_N: Ints | None
    pair_N: Ints
    experts: int


def changes(routed: Routed, a_P: Ints, b_P: Ints) -> pd.DataFrame:
    """What is other in one token of each aligned pair than in the other.

    Returns:
        A row a pair: `overlap` |A and B| / k, k the choices of the token with more of them (0 to
        1); `set_changed`, `first_changed`: 1 where the set, or the first choice, is another one;
        `weight_change`: half the sum over experts of |g - g'|, gates divided by their sum (0 to 1).
        NaN: not known.
    """
    ids_aPK, ids_bPK = routed.ids_NK[a_P], routed.ids_NK[b_P]
    size_a, size_b = (ids_aPK >= 0).sum(1), (ids_bPK >= 0).sum(1)
    same_PKK = (ids_aPK[:, :, None] == ids_bPK[:, None, :]) & (ids_aPK >= 0)[:, :, None]
    shared_P, most_P = same_PKK.sum((1, 2)), np.maximum(size_a, size_b)
    first = np.full(len(a_P), np.nan)
    if routed.ranked and ids_aPK.shape[1]:
        first = (ids_aPK[:, 0] != ids_bPK[:, 0]).astype(float)
    weight = np.full(len(a_P), np.nan)
    if routed.weights_NK is not None:
        g_aPK, g_bPK = _gates(routed.weights_NK[a_P]), _gates(routed.weights_NK[b_P])
        moved = (np.abs(g_aPK[:, :, None] - g_bPK[:, None, :]) * same_PKK).sum((1, 2))
        # What only one of the two has moves whole; -1 is no expert, and has no weight.
        alone = (g_aPK * ~same_PKK.any(2)).sum(1) + (g_bPK * ~same_PKK.any(1)).sum(1)
        weight = (moved + alone) / 2
    return pd.DataFrame(
        {
            "overlap": np.where(most_P > 0, shared_P / np.maximum(most_P, 1), np.nan),
            "set_changed": (shared_P < most_P).astype(float),
            "first_changed": first,
            "weight_change": weight,
        }
    )


def elsewhere(routed: Routed, a_P: Ints, b_P: Ints) -> pd.DataFrame:
    """What a token of another sequence with the same id has in common with these, on average.

    Exact: the mean over all tokens with the id outside of the pair's own sequences, for a and for
    b, and over the two.

    Returns:
        A row a pair: `id_overlap` (divided by the token's choices), `id_set_changed`,
        `id_first_changed`. NaN where no other sequence has the id, or ids are not known.
    """
    names = ("id_overlap", "id_set_changed", "id_first_changed")
    if routed.token_id_N is None or not len(a_P):
        return pd.DataFrame(dict.fromkeys(names, np.full(len(a_P), np.nan)))
    wanted_X = np.unique(routed.token_id_N[a_P])
    at_N = np.flatnonzero(np.isin(routed.token_id_N, wanted_X))
    ids_NK, pair_N = routed.ids_NK[at_N], routed.pair_N[at_N]
    x_N = np.searchsorted(wanted_X, routed.token_id_N[at_N])
    own_N = x_N * (int(pair_N.max(initial=-1)) + 2) + pair_N + 1  # an id within a pair's sequences
    owns, own_N = np.unique(own_N, return_inverse=True)
    all_XE = tally(x_N, ids_NK, len(wanted_X), routed.experts)
    own_YE = tally(own_N, ids_NK, len(owns), routed.experts)
    set_N = _numbered(np.sort(ids_NK, axis=1))
    first_N = _numbered(ids_NK[:, :1])
    out_2P3 = np.empty((2, len(a_P), 3))
    for side, t_P in enumerate((a_P, b_P)):
        p_P = np.searchsorted(at_N, t_P)  # a and b have the same id, so both are there
        x_P, own_P, ids_PK = x_N[p_P], own_N[p_P], ids_NK[p_P]
        others_P = np.bincount(x_N)[x_P] - np.bincount(own_N)[own_P]
        others_P = np.where(others_P > 0, others_P, np.nan)
        others_PE = all_XE[x_P] - own_YE[own_P]
        chosen_PK = np.take_along_axis(others_PE, ids_PK, 1) * (ids_PK >= 0)
        k_P = np.maximum((ids_PK >= 0).sum(1), 1)
        out_2P3[side, :, 0] = chosen_PK.sum(1) / k_P / others_P
        for column, value_N in ((1, set_N), (2, first_N)):
            same_P = _alike(x_N, value_N)[p_P] - _alike(own_N, value_N)[p_P]
            out_2P3[side, :, column] = 1 - same_P / others_P
    if not routed.ranked:
        out_2P3[..., 2] = np.nan
    return pd.DataFrame(out_2P3.mean(0), columns=list(names))


def _numbered(values_NK: Ints) -> Ints:
    """The same number for the same row."""
    return np.unique(values_NK, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _alike(group_N: Ints, value_N: Ints) -> Ints:
    """Of each token: how many of its group have its value, itself among them."""
    key_N = group_N * (int(value_N.max(initial=0)) + 1) + value_N
    _, at_N, counts = np.unique(key_N, return_inverse=True, return_counts=True)
    return np.asarray(counts[at_N], np.int64)


def by_load(ids_NK: Ints, experts: int) -> float:
    """Overlap of two tokens drawn at random: above k/E where the load is uneven."""
    load_E = tally(np.zeros(len(ids_NK), np.int64), ids_NK, 1, experts)[0].astype(float)
    tokens, choices = len(ids_NK), load_E.sum()
    if tokens < 2 or not choices:
        return float("nan")
    # A token has all its own experts: these pairs are taken out.
    return float((load_E @ load_E - choices) / ((tokens - 1) * choices))


def parts(overlap: float, of_id: float, random: float) -> dict[str, float]:
    """What of a token's experts its id, its content and the order say; they sum to 1.

    `id_part` (o_id - o_0) / (1 - o_0), `content_part` (o - o_id) / (1 - o_0) and `order_part`
    (1 - o) / (1 - o_0), o the overlap of the same content in another order, o_id of the same id in
    other sequences, o_0 of any two tokens. `id_part` is the context-free share: 1, a lookup table.
    """
    room = 1 - random if random < 1 else float("nan")
    return {
        "id_part": (of_id - random) / room,
        "content_part": (overlap - of_id) / room,
        "order_part": (1 - overlap) / room,
    }


def by_octave(tokens: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means of the changes by octave of a place: 0, 1, 2 to 3, 4 to 7, and so on.

    Args:
        tokens: A row an aligned pair: the columns of `changes`, `layer` and `column`.
        column: `distance` from the change, or `position`.

    Returns:
        `layer`, `first`, `last`, `tokens` and the changes; places below 0 are left out.
    """
    placed = tokens[tokens[column] >= 0]
    placed = placed.assign(octave=octave(placed[column].to_numpy(np.int64)))
    groups = placed.groupby(["layer", "octave"])
    out = groups[list(CHANGES)].mean().assign(tokens=groups.size()).reset_index()
    octave_N = out["octave"].to_numpy(np.int64)
    out.insert(1, "first", np.where(octave_N > 0, 2 ** np.maximum(octave_N - 1, 0), 0))
    out.insert(2, "last", 2**octave_N - 1)
    return out.drop(columns="octave")[["layer", "first", "last", "tokens", *CHANGES]]


def _gates(weights_PK: Floats) -> Any:
    sums_P = weights_PK.sum(1, keepdims=True)
    return weights_PK / np.where(sums_P > 0, sums_P, np.nan)
