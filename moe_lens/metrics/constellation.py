"""How much of a conversation's later routing its beginning foretells: recall, for every m.

A constellation is the m experts of a layer that the first tokens of a sequence chose most. Beside
it stand as many experts that were most popular in the other sequences (never in its own, nor in one
that holds the same text), as many that the rest itself chooses most, which no m experts beat, and
chance, m/E.

Legend: S sequences, T tokens, E experts, m experts of the constellation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.accesses import Ints
from moe_lens.metrics.tokens import Tokens

NAMED_BY = ("prefix", "popularity", "oracle")


@dataclass(frozen=True)
class Foretold:
    """What the first tokens of sequences say about the choices after them.

    Attributes:
        prefix: Tokens of the beginning; below 1: share of the sequence.
        sequences: That go on after it.
        choices: After it, of all of them.
        recall: A row for m = 1 … E: `size` (m), the share of those choices among the m experts
            named by each of `NAMED_BY`, and `chance` (m / E). Popularity is NaN where there are no
            other sequences.
        cover: The share of a prefix's choices that its smallest set was asked to take.
        covering: Experts of that set, mean over the sequences.
        covered: Recall of these sets, and of as many named otherwise: a value by name.
    """

    prefix: float
    sequences: int
    choices: int
    recall: pd.DataFrame
    cover: float
    covering: float
    covered: dict[str, float]


def after(tokens: Tokens, prefix: float) -> NDArray[np.bool_]:
    """`[T]`: tokens that come after the beginning of their sequence.

    Args:
        tokens: Whole sequences one after another.
        prefix: Tokens of the beginning, 1 or more; or a share of the sequence, between 0 and 1,
            rounded up to whole tokens.
    """
    if not len(tokens):
        return np.zeros(0, bool)
    begins_S, of_S = tokens.begins(), tokens.lengths()
    # By position: a token that nothing computed for in this layer is one all the same.
    first_S, last_S = tokens.positions[begins_S], tokens.positions[begins_S + of_S - 1]
    lengths_S = last_S - first_S + 1
    begun_S = np.ceil(lengths_S * prefix) if prefix < 1 else np.full(len(lengths_S), prefix)
    return np.asarray(tokens.positions >= np.repeat(first_S + begun_S, of_S))


def foretold(
    tokens: Tokens,
    counted_T: NDArray[np.bool_],
    prefix: float,
    cover: float = 0.9,
    text_S: Ints | None = None,
) -> Foretold:
    """Recall of a layer's constellations on what comes after them.

    Ties: the more popular in the other sequences, then the lower id.

    Args:
        tokens: Of one layer, whole sequences one after another.
        counted_T: What is foretold, and what popularity is of: tokens of one phase. The beginning
            of a sequence is its first tokens, whatever their phase.
        prefix: As `after` says.
        cover: Share of the prefix's choices, above 0, up to 1.
        text_S: As `popularity` says.
    """
    experts, after_T = tokens.experts, after(tokens, prefix)
    prefix_SE = counts(tokens, ~after_T)
    rest_SE = counts(tokens, after_T & counted_T)
    popular_SE = popularity(counts(tokens, counted_T), text_S)
    asked_S = (rest_SE.sum(1) > 0) & (prefix_SE.sum(1) > 0)
    prefix_SE, rest_SE, popular_SE = (x[asked_S] for x in (prefix_SE, rest_SE, popular_SE))
    choices = int(rest_SE.sum())
    by_prefix_SE = orders(prefix_SE, popular_SE)
    found = {
        "prefix": by_prefix_SE,
        "popularity": orders(popular_SE, np.zeros_like(popular_SE)),
        "oracle": orders(rest_SE, np.zeros_like(rest_SE)),
    }
    sums = {
        name: np.take_along_axis(rest_SE, order_SE, 1).cumsum(1) for name, order_SE in found.items()
    }
    sizes_S = _covering(np.take_along_axis(prefix_SE, by_prefix_SE, 1), cover)
    recall = pd.DataFrame({"size": np.arange(1, experts + 1)})
    covered = {}
    for name, hits_SE in sums.items():
        unknown = name == "popularity" and not popular_SE.any()
        total = math.nan if unknown or not choices else float(choices)
        recall[name] = hits_SE.sum(0) / total
        own_hits_S = np.take_along_axis(hits_SE, sizes_S[:, None] - 1, 1)
        covered[name] = float(own_hits_S.sum() / total)
    recall["chance"] = recall["size"] / experts
    weight_S = rest_SE.sum(1)
    covered["chance"] = float((weight_S @ sizes_S) / experts / (choices or math.nan))
    mean = float(sizes_S.mean()) if len(sizes_S) else math.nan
    return Foretold(prefix, int(asked_S.sum()), choices, recall, cover, mean, covered)


def by_beginning(found: Iterable[Foretold], size: int) -> pd.DataFrame:
    """What `figures.prefix_recall` draws: a row a beginning that is given in tokens.

    Args:
        found: Of one layer.
        size: Experts that are named; a layer of fewer has all.

    Returns:
        `tokens`, `size`, and the recall by each of `NAMED_BY` and `chance`.
    """
    rows = [
        {"tokens": int(x.prefix), **x.recall.iloc[min(size, len(x.recall)) - 1].to_dict()}
        for x in found if x.prefix >= 1 and x.sequences
    ]  # fmt: skip
    columns = ["tokens", "size", *NAMED_BY, "chance"]
    return pd.DataFrame(rows, columns=columns).astype({"size": int})


def popularity(own_SE: Ints, text_S: Ints | None = None) -> Ints:
    """`[S, E]`: choices of each expert by all sequences but those of one text with this one.

    Args:
        own_SE: Choices by each sequence.
        text_S: The same number, from 0, for sequences that hold one text, in whatever order: the
            one would else foretell the other. None: each holds another.
    """
    if text_S is None:
        text_S = np.arange(len(own_SE))
    of_text = np.zeros((int(text_S.max(initial=-1)) + 1, own_SE.shape[1]), np.int64)
    np.add.at(of_text, text_S, own_SE)
    return np.asarray(own_SE.sum(0) - of_text[text_S], np.int64)


def orders(counts_SE: Ints, ties_SE: Ints) -> NDArray[np.intp]:
    """`[S, E]`: experts by falling count, ties by falling `ties_SE`, then by rising id."""
    return np.lexsort((-ties_SE, -counts_SE), axis=1)


def counts(tokens: Tokens, part_T: NDArray[np.bool_]) -> Ints:
    """`[S, E]`: choices of each expert by these tokens of each sequence."""
    of_N = tokens.chosen.of_requests()
    in_N = part_T[of_N]
    sequence_T = np.repeat(np.arange(len(tokens.begins())), tokens.lengths())
    shape = len(tokens.begins()), tokens.experts
    cells = sequence_T[of_N[in_N]] * tokens.experts + tokens.chosen.expert_ids[in_N]
    return np.asarray(np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape), np.int64)


def _covering(sorted_SE: Ints, cover: float) -> Ints:
    """`[S]`: the fewest experts that have this share of the choices, 1 or more."""
    total_S1 = sorted_SE.sum(1, keepdims=True)
    # Rounded: 0.9 * 10 choices are 9, whatever the floats say.
    short_SE = sorted_SE.cumsum(1) < np.round(cover * total_S1, 9)
    return np.asarray(short_SE.sum(1) + 1, np.int64)
