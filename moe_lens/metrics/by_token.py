"""How choices depend on a token's id and its position, and what they would show by chance.

Shares of rare ids mean nothing: an id that occurs once gives each of its experts 100 %. So only ids
that occur `MIN_COUNT` times count, and of those too the largest share is above the expert's own by
chance. The null moves ids against choices: sequences change places, each keeping the order of its
ids, and the whole is turned by a random stretch; every id keeps its number of tokens, every expert
its load.

Legend: R draws, N tokens of whole sequences, one after another, M those with a frequent id, K
choices of a token, X frequent ids, S sequences or documents (`by_tag`), G tags, E experts, B
octaves of positions, Y experts twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.by_tag import PERMUTATIONS, permuted, tally, x_ln_x
from moe_lens.metrics.chance import SEED, Floats, Ints

MIN_COUNT = 10
"""Tokens with an id below which it is left out."""
CELLS = 262_144
"""Of a table by id; beyond it the most frequent ids stand for all."""


@dataclass(frozen=True)
class OfIds:
    """What ids say about experts: as it is (0), and with the ids moved (1 to R).

    Attributes:
        information: I(expert of a choice; id of its token), nats.
        most: What it can be: I(expert of a choice; its token).
        max_share: Mean over ids of the largest share of an id's tokens that choose one expert.
        agreement: Probability that another token with a token's id has the same first choice.
    """

    information: Floats
    most: float
    max_share: Floats
    agreement: Floats


def of_ids(
    ids_NK: Ints, token_id_N: Ints, sequence_N: Ints, experts: int, min_count: int = MIN_COUNT
) -> OfIds:
    """Of the ids that occur often enough; NaN where none does."""
    id_M, ids_MK, sequence_M, count_X = _frequent(
        ids_NK, token_id_N, sequence_N, min_count, CELLS // experts
    )
    values = len(count_X)
    if not (ids_MK >= 0).any():
        nothing = np.full(1 + PERMUTATIONS, np.nan)
        return OfIds(nothing, float("nan"), nothing, nothing)
    load_E = tally(np.zeros_like(id_M), ids_MK, 1, experts)[0]
    fixed = x_ln_x(load_E).sum() - x_ln_x(load_E.sum())
    again_X = np.where(count_X > 1, count_X - 1.0, np.nan)
    out_R3 = np.empty((1 + PERMUTATIONS, 3))
    ln_table = x_ln_x(np.arange(int(count_X.max()) * ids_MK.shape[1] + 1))
    starts_S, sizes_S = _pieces(sequence_M)
    rng = np.random.default_rng(SEED)
    choices_M = (ids_MK >= 0).sum(1)
    for r in range(1 + PERMUTATIONS):
        moved_M = id_M if r == 0 else id_M[_elsewhere(starts_S, sizes_S, rng)]
        counts_XE = tally(moved_M, ids_MK, values, experts)
        first_XE = tally(moved_M, ids_MK[:, :1], values, experts)
        of_X = counts_XE.sum(1)
        nats = ln_table[counts_XE].sum() - ln_table[of_X].sum() - fixed
        same_X = (first_XE * (first_XE - 1.0)).sum(1) / again_X
        out_R3[r] = (
            nats / load_E.sum(),
            (counts_XE.max(1) / count_X).mean(),
            np.nansum(same_X) / np.maximum(count_X[count_X > 1].sum(), 1),
        )
    most = -fixed - x_ln_x(choices_M).sum()
    return OfIds(out_R3[:, 0], float(most / load_E.sum()), out_R3[:, 1], out_R3[:, 2])


def given_ids(
    ids_NK: Ints, token_id_N: Ints, sequence_N: Ints, tag_N: Ints, tags: int, experts: int
) -> Floats:
    """How far tags' choices are from what their ids would make them: nats, `[1 + R]`.

    As it is (0), and with the tags permuted over the documents (1 to R). NaN where no id occurs
    often enough. An id's part is its share of each expert over all tags: where only one tag has the
    id, nothing can be said, and nothing is.
    """
    id_M, ids_MK, document_M, count_X = _frequent(
        ids_NK, token_id_N, sequence_N * tags + tag_N, MIN_COUNT, CELLS // experts
    )
    if not (ids_MK >= 0).any():
        return np.full(1 + PERMUTATIONS, np.nan)
    documents, at_M, size_S = np.unique(document_M, return_inverse=True, return_counts=True)
    share_XE = tally(id_M, ids_MK, len(count_X), experts) / count_X[:, None]
    by_document_ME = share_XE[id_M[np.argsort(at_M, kind="stable")]]
    expected_SE = np.add.reduceat(by_document_ME, np.cumsum(size_S) - size_S)
    both_SY = np.hstack([tally(at_M, ids_MK, len(documents), experts), expected_SE])
    tag_S = documents % tags
    own_GY = (tag_S == np.arange(tags)[:, None]) @ both_SY
    both_RGY = np.concatenate([own_GY[None], permuted(both_SY, tag_S, tags)])
    return _surprise(both_RGY[..., :experts], both_RGY[..., experts:])


def _surprise(seen_RGE: Floats, expected_RGE: Floats) -> Floats:
    """Mean over tags, each by its choices, of KL(what they choose || what was expected), nats."""
    total_RG1 = seen_RGE.sum(-1, keepdims=True)
    scale_RG1 = expected_RGE.sum(-1, keepdims=True) / np.maximum(total_RG1, 1)
    there = seen_RGE > 0
    ratio_RGE = seen_RGE * scale_RG1 / np.where(there, expected_RGE, 1.0)
    nats_R = (seen_RGE * np.log(np.where(there, ratio_RGE, 1.0))).sum((-1, -2))
    return np.asarray(np.maximum(nats_R / total_RG1.sum((-1, -2)), 0.0))


def octave(position_N: Ints) -> Ints:
    """0, 1, 2 to 3, 4 to 7, and so on: the number of bits of the position."""
    return np.asarray(np.ceil(np.log2(np.asarray(position_N) + 1.0)), np.int64)


def moved_positions(ids_NK: Ints, position_N: Ints, sequence_N: Ints, experts: int) -> Ints:
    """`[R, B, E]`: choices by octave, with each sequence's choices turned by a random stretch."""
    octave_N = octave(position_N)
    octaves = int(octave_N.max(initial=-1)) + 1
    starts_S, sizes_S = _pieces(sequence_N)
    starts_N, sizes_N = np.repeat(starts_S, sizes_S), np.repeat(sizes_S, sizes_S)
    at_N = np.arange(len(octave_N)) - starts_N
    ids_NK = np.asfortranarray(ids_NK)
    rng = np.random.default_rng(SEED)
    out_RBE = np.empty((PERMUTATIONS, octaves, experts), np.int64)
    for moved_BE in out_RBE:
        turned_N = (at_N + np.repeat(rng.integers(0, sizes_S), sizes_S)) % sizes_N
        moved_BE[:] = tally(octave_N[starts_N + turned_N], ids_NK, octaves, experts)
    return out_RBE


def tokens_of_experts(
    ids_NK: Ints, token_id_N: Ints, experts: int, top: int = 10, min_count: int = MIN_COUNT
) -> pd.DataFrame:
    """The ids of which each expert takes the largest share.

    The stored question `expert_serves` has those of one expert, from every kept row.

    Args:
        ids_NK: The router's choices; -1: none.
        token_id_N: Vocabulary ids.
        experts: E.
        top: Ids of each expert.
        min_count: Tokens with an id below which it is left out.

    Returns:
        `expert`, `token_id`, `tokens` with the id, `chosen` of them, `share` chosen / tokens,
        `lift` over the share of all tokens that choose the expert; by expert and falling share.
    """
    values, id_N, count_X = np.unique(token_id_N, return_inverse=True, return_counts=True)
    chosen_XE = tally(id_N, ids_NK, len(values), experts)
    overall_E = tally(np.zeros_like(token_id_N), ids_NK, 1, experts)[0] / max(len(token_id_N), 1)
    rows = pd.DataFrame(
        {
            "expert": np.tile(np.arange(experts), len(values)),
            "token_id": np.repeat(values, experts),
            "tokens": np.repeat(count_X, experts),
            "chosen": chosen_XE.ravel(),
        }
    )
    rows = rows[(rows["chosen"] > 0) & (rows["tokens"] >= min_count)]
    rows["share"] = rows["chosen"] / rows["tokens"]
    rows["lift"] = rows["share"] / overall_E[rows["expert"]]
    order = ["expert", "share", "chosen", "token_id"]
    rows = rows.sort_values(order, ascending=[True, False, False, True])
    return rows.groupby("expert").head(top).reset_index(drop=True)


def experts_by_position(ids_NK: Ints, position_N: Ints, experts: int) -> pd.DataFrame:
    """What each expert takes of the tokens in each octave of positions.

    Returns:
        `first`, `last` position, `expert`, `tokens` there, `share` of them that choose the expert,
        `lift` over the share of all tokens; octaves without tokens are left out.
    """
    octave_N = octave(position_N)
    tokens_B = np.bincount(octave_N)
    chosen_BE = tally(octave_N, ids_NK, len(tokens_B), experts)
    there_B = np.flatnonzero(tokens_B)
    share_BE = chosen_BE[there_B] / tokens_B[there_B, None]
    overall_E = chosen_BE.sum(0) / max(len(octave_N), 1)
    first_B = np.where(there_B > 0, 2 ** np.maximum(there_B - 1, 0), 0)
    return pd.DataFrame(
        {
            "first": np.repeat(first_B, experts),
            "last": np.repeat(2**there_B - 1, experts),
            "expert": np.tile(np.arange(experts), len(there_B)),
            "tokens": np.repeat(tokens_B[there_B], experts),
            "share": share_BE.ravel(),
            "lift": (share_BE / np.where(overall_E > 0, overall_E, np.nan)).ravel(),
        }
    )


def _frequent(
    ids_NK: Ints, token_id_N: Ints, sequence_N: Ints, min_count: int, most: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """Of tokens with frequent ids: the id's number, choices, sequence; and tokens by number."""
    _, id_N, count = np.unique(token_id_N, return_inverse=True, return_counts=True)
    often = count >= min_count
    often[np.argsort(-count, kind="stable")[max(most, 1) :]] = False
    kept_N = often[id_N]
    number = np.cumsum(often) - 1
    # The choices of a slot one after another in memory: they are counted again and again.
    ids_MK = np.asfortranarray(ids_NK[kept_N])
    return number[id_N[kept_N]], ids_MK, sequence_N[kept_N], count[often]


def _pieces(sequence_N: Ints) -> tuple[Ints, Ints]:
    """Where each sequence starts, and its tokens."""
    starts_S = np.flatnonzero(np.diff(sequence_N, prepend=sequence_N[:1] - 1))
    return starts_S, np.diff(starts_S, append=len(sequence_N))


def _elsewhere(starts_S: Ints, sizes_S: Ints, rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of all tokens: sequences in another order, then turned by a random stretch."""
    order_S = rng.permutation(len(starts_S))
    sizes, before_S = sizes_S[order_S], starts_S[order_S]
    before_S = before_S - np.cumsum(sizes) + sizes
    at_M = np.repeat(before_S, sizes) + np.arange(int(sizes_S.sum()))
    return np.roll(at_M, int(rng.integers(1, max(len(at_M), 2))))  # of one sequence: not as it is
