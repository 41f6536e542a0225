"""Tokens of one layer from plain lists, as the answer of `token_experts` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
from hypothesis import strategies as st

from moe_lens.metrics.tokens import Tokens, tokens_of

Sequence_ = tuple[str, Sequence[Iterable[int]]]
"""A tag, and the experts of each token."""


def table(sequences: Sequence[Sequence_], run: str = "run") -> pd.DataFrame:
    """Sequence after sequence; each is a forward of its own."""
    rows = []
    nth = 0
    for number, (tag, tokens) in enumerate(sequences):
        for position, experts in enumerate(tokens):
            rows += [
                {"run": run, "nth": nth, "rank": 0, "sequence": 10 * number, "tag": tag,
                 "position": position, "step": number, "forward": 0, "expert": e}
                for e in sorted(set(experts))
            ]  # fmt: skip
            nth += 1
    columns = ["run", "nth", "rank", "sequence", "tag", "position", "step", "forward", "expert"]
    return pd.DataFrame(rows, columns=columns)


def tokens(sequences: Sequence[Sequence_], experts: int) -> Tokens:
    return tokens_of(table(sequences), experts)


def conversations(experts: int, most: int = 5) -> st.SearchStrategy[list[Sequence_]]:
    """Some short sequences of tokens that chose one to three experts."""
    token = st.sets(st.integers(0, experts - 1), min_size=1, max_size=3)
    sequence = st.tuples(st.sampled_from(["a", "b"]), st.lists(token, min_size=1, max_size=8))
    return st.lists(sequence, min_size=1, max_size=most)


def simulated(
    sets: Sequence[set[int]], size: int, first: int, worth: Callable[[int, int], object]
) -> int:
    """Hits from `first` on of a cache that starts empty.

    `worth(t, expert)` after access t: the least worth leaves; of equals the higher id.
    """
    content: set[int] = set()
    hits = 0
    for t, needed in enumerate(sets):
        hits += len(needed & content) * (t >= first)
        content |= needed
        while len(content) > size:
            content.remove(min(content - needed, key=lambda e: (worth(t, e), -e)))
    return hits
