"""What batching sequences of one tag together saves: experts touched, beside mixed batches.

A batch of B sequences takes one token of each, as a step of decoding does. All batches are drawn
from the same sequences; only who is together differs. Experts touched are experts whose weights
have to be read: the fewer, the better.

Legend: T tokens, B sequences of a batch, D batches drawn, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.tokens import Tokens
from moe_lens.metrics.working_set import by_chance

ALL = "all tags"
"""The row of all tags together."""


def by_tag(
    tokens: Tokens, batch: int, *, draws: int = 400, shuffles: int = 40, seed: int = 0
) -> pd.DataFrame:
    """Experts that batches of B sequences touch, grouped by tag and mixed.

    Tags with fewer than B sequences are left out, of mixed batches too. Grouped batches have a tag
    as often as it has sequences, so that both kinds draw every sequence equally often.

    Args:
        tokens: Of one layer.
        batch: B, 2 or more.
        draws: Batches of each kind.
        shuffles: Times that tags are dealt out anew among the sequences, for what chance shows.
        seed: Of all draws.

    Returns:
        The row "all tags" first, then a row a tag, by name: `tag`, `sequences`, `batch`, `grouped`
        (mean experts touched by a batch of this tag, 1 to E), `mixed` (the same of mixed batches),
        `ratio` = grouped / mixed (below 1: grouping saves), `ratio_se` (its standard error over the
        draws), `chance` (what a uniform router's B tokens touch). In the first row also `null_low`
        and `null_high`: the 5th and 95th percentile of the ratio where tags mean nothing. No rows
        where fewer than two tags have B sequences.
    """
    if batch < 2:
        raise ValueError(f"a batch has 2 sequences or more; got {batch}")
    rng = np.random.default_rng(seed)
    touched_TE = tokens.chosen.touched()
    begins = tokens.begins()
    lengths = tokens.lengths()
    tag_of = tokens.tags[begins].astype(str)
    names, sizes = np.unique(tag_of, return_counts=True)
    kept = [str(name) for name, n in zip(names, sizes, strict=True) if n >= batch]
    columns = ["tag", "sequences", "batch", "grouped", "mixed", "ratio", "ratio_se", "chance",
               "null_low", "null_high"]  # fmt: skip
    if len(kept) < 2:
        return pd.DataFrame(columns=columns)
    inside = np.flatnonzero(np.isin(tag_of, kept))

    def draw(pool: NDArray[np.intp], times: int) -> NDArray[np.float64]:
        """Experts touched by batches of different sequences of a pool."""
        lots = rng.random((times, len(pool)), np.float32)
        chosen = pool[np.argpartition(lots, batch - 1, axis=1)[:, :batch]]
        at = begins[chosen] + (rng.random(chosen.shape) * lengths[chosen]).astype(np.int64)
        touched: NDArray[np.float64] = touched_TE[at].any(axis=1).sum(axis=1).astype(np.float64)
        return touched

    def grouped_by(tags: NDArray[np.str_]) -> NDArray[np.float64]:
        pools = [inside[tags == name] for name in kept]
        times = rng.multinomial(draws, [len(pool) / len(inside) for pool in pools])
        return np.concatenate([draw(pool, n) for pool, n in zip(pools, times, strict=True)])

    mixed = draw(inside, draws)
    tags = tag_of[inside]
    found = {ALL: (len(inside), grouped_by(tags))}
    for name in kept:
        pool = inside[tags == name]
        found[name] = (len(pool), draw(pool, draws))
    null = [
        grouped_by(rng.permutation(tags)).mean() / draw(inside, draws).mean()
        for _ in range(shuffles)
    ]
    low, high = np.quantile(null, [0.05, 0.95]) if null else (math.nan, math.nan)
    rows = []
    for name, (sequences, grouped) in found.items():
        ratio = grouped.mean() / mixed.mean()
        spread = math.hypot(_relative(grouped), _relative(mixed))
        limits = (low, high) if name == ALL else (math.nan, math.nan)
        rows.append((name, sequences, batch, grouped.mean(), mixed.mean(), ratio, ratio * spread,
                     float(by_chance(tokens.experts, tokens.top_k, batch)), *limits))  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _relative(values: NDArray[np.float64]) -> float:
    """Standard error of the mean, over the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values)) / values.mean())
