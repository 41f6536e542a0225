"""Rates of groups of layers or tags, from the counts of `dropped_tokens`."""

from __future__ import annotations

import pandas as pd

from moe_lens.figures.columns import numbers
from moe_lens.numbers import count

COUNTS = ("tokens", "routed", "overflowed", "dropped", "unserved_tokens")


def rates(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Counts summed by a column, and their rates: of choices, and of tokens for unserved ones.

    Returns:
        Columns `by`, the counts, overflowed_rate, dropped_rate, unserved_tokens_rate; in ascending
        order of `by`.
    """
    sums = pd.DataFrame({by: table[by], **{c: numbers(table, c) for c in COUNTS}})
    sums = sums.groupby(by, as_index=False).sum()
    choices, tokens = (sums[c].where(sums[c] > 0) for c in ("routed", "tokens"))
    sums["overflowed_rate"] = sums["overflowed"] / choices
    sums["dropped_rate"] = sums["dropped"] / choices
    sums["unserved_tokens_rate"] = sums["unserved_tokens"] / tokens
    return sums


def nothing_lost(found: pd.DataFrame) -> str:
    """The sentence for a run without drops."""
    return f"No token was dropped: each of {count(found['routed'].sum())} choices was computed."
