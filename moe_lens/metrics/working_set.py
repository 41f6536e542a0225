"""The working set of a conversation: how many experts of a layer it touches, and how many it needs.

Denning, "The working set model for program behavior" (CACM 11, 1968), with tokens for time. Nothing
crosses the boundary of a sequence.

Legend: T tokens, E experts, k choices per token, tau tokens since a sequence began.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.accesses import Ints
from moe_lens.metrics.tokens import Tokens

SHARES = (0.90, 0.95, 0.99)


def by_chance(
    experts: int, top_k: float, tokens: NDArray[np.integer] | float
) -> NDArray[np.float64]:
    """Experts that tau tokens touch if each draws k of E uniformly: E (1 - (1 - k/E)^tau)."""
    return np.asarray(experts * (1 - (1 - top_k / experts) ** np.asarray(tokens, float)))


def by_sequence(tokens: Tokens) -> pd.DataFrame:
    """What each sequence touches in this layer.

    Returns:
        A row a sequence, in their order: `sequence` (its number), `tag` (of its first token),
        `tokens`, `touched` (distinct experts, 1 to E), `chance` (what uniform choices of as many
        tokens would touch), and for 90, 95 and 99 % `needed_90` and so on: the fewest experts that
        together have this share of the sequence's choices (1 to `touched`).
    """
    counts, begins = _counts(tokens), tokens.begins()
    lengths = tokens.lengths()
    ranked = -np.sort(-counts, axis=1)
    reached = np.cumsum(ranked, axis=1)
    total = reached[:, -1:]
    rows = pd.DataFrame(
        {
            "sequence": tokens.sequences[begins],
            "tag": tokens.tags[begins],
            "tokens": lengths,
            "touched": (counts > 0).sum(axis=1),
            "chance": by_chance(tokens.experts, tokens.top_k, lengths),
        }
    )
    for share in SHARES:
        # In whole choices: 0.9 * 10 is a hair above 9 in floating point.
        enough = reached * 100 >= round(share * 100) * total
        rows[f"needed_{round(share * 100)}"] = enough.argmax(axis=1) + 1
    return rows


def over_time(tokens: Tokens) -> pd.DataFrame:
    """How the working set grows: means over the sequences that are long enough.

    Returns:
        A row for tau = 1, 2, 4, … tokens up to the longest sequence, and its length: `tokens`
        (tau), `sequences` (that have so many), `touched` (mean of distinct experts in their first
        tau tokens), `low` and `high` (the least and the most), `chance`.
    """
    touched_TE = tokens.chosen.touched()
    grown = [
        np.logical_or.accumulate(touched_TE[begin : begin + length], axis=0).sum(axis=1)
        for begin, length in zip(tokens.begins(), tokens.lengths(), strict=True)
    ]
    longest = max(map(len, grown), default=0)
    taus = [2**i for i in range(longest.bit_length()) if 2**i < longest]
    rows = []
    for tau in [*taus, longest] if longest else []:
        here = np.array([each[tau - 1] for each in grown if len(each) >= tau])
        rows.append((tau, len(here), here.mean(), here.min(), here.max()))
    out = pd.DataFrame(rows, columns=["tokens", "sequences", "touched", "low", "high"])
    return out.assign(chance=by_chance(tokens.experts, tokens.top_k, out["tokens"].to_numpy()))


def _counts(tokens: Tokens) -> Ints:
    """`[sequences, E]`: choices."""
    of_T = np.cumsum(np.diff(tokens.sequences, prepend=-1) != 0) - 1
    cells = of_T[tokens.chosen.of_requests()] * tokens.experts + tokens.chosen.expert_ids
    shape = (len(tokens.begins()), tokens.experts)
    counts: Ints = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    return counts
