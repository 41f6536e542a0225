"""What a cache of experts has to load after a conversation's beginning, by what it begins with.

Least recently used leaves first, always; what is resident before the first token that counts (the
first after the beginning; of decoding, the first after the prompt) differs. `cold`: nothing.
`popularity`: the M experts most popular in sequences of other texts. `prefix`: the M that the first
tokens of the sequence chose most. `kept`: what serving all earlier tokens left there, which asks
for no load ahead. `optimum`: any M experts, and the future known; no beginning loads less.

Legend: S sequences, T tokens, E experts, M resident.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.accesses import Accesses, Ints
from moe_lens.metrics.cache import optimum_hits, recency
from moe_lens.metrics.constellation import after, counts, orders, popularity
from moe_lens.metrics.stack import hits_by_size, stack_places
from moe_lens.metrics.tokens import Tokens

STARTS = ("cold", "popularity", "prefix", "kept", "optimum")


@dataclass(frozen=True)
class Loads:
    """What is loaded after the beginnings of sequences.

    Attributes:
        prefix: Tokens of the beginning, or share of the sequence.
        sequences: That go on after it.
        tokens: Of the phase that is counted, after it.
        requests: Experts that these ask for.
        loads: A row for each M from the largest access to E: `size` (M), and for each of `STARTS`
            the loads of all sequences; popularity is NaN where there are no others.
    """

    prefix: float
    sequences: int
    tokens: int
    requests: int
    loads: pd.DataFrame


def loads(
    tokens: Tokens, counted_T: NDArray[np.bool_], prefix: float, text_S: Ints | None = None
) -> Loads:
    """Loads of one layer's cache, sequence by sequence, one token after another.

    Loading ahead is no load here: it costs up to M of them a sequence, while nobody waits.

    Args:
        tokens: Of one layer, whole sequences one after another.
        counted_T: Tokens of the phase whose loads are counted.
        prefix: Of the beginning, as `constellation.after` says.
        text_S: As `constellation.popularity` says.
    """
    experts, after_T = tokens.experts, after(tokens, prefix)
    popular_SE = popularity(counts(tokens, counted_T), text_S)
    prefix_SE = counts(tokens, ~after_T)
    first_SE = {
        "popularity": orders(popular_SE, np.zeros_like(popular_SE)),
        "prefix": orders(prefix_SE, popular_SE),
    }
    sizes = np.arange(max(tokens.chosen.largest, 1), experts + 1)
    hits = {name: np.zeros(experts + 1, np.int64) for name in STARTS}
    sequences = requests = 0
    for s, (begin, end) in enumerate(pairwise([*tokens.begins().tolist(), len(tokens)])):
        asked_T = counted_T[begin:end] & after_T[begin:end]
        if after_T[begin] or not asked_T.any():
            continue
        middle = begin + int(asked_T.argmax())
        is_counted = asked_T[middle - begin :]
        before, rest = _part(tokens.chosen, begin, middle), _part(tokens.chosen, middle, end)
        is_asked = is_counted[rest.of_requests()]
        ahead = {name: _singles(first_SE[name][s][::-1], experts) for name in first_SE}
        for name, first in (("cold", None), ("kept", before), *ahead.items()):
            hits[name] += hits_by_size(_places(first, rest)[is_asked], experts)
        hits["optimum"] += optimum_hits(_only(rest, is_counted))
        sequences, requests = sequences + 1, requests + int(is_asked.sum())
    table = pd.DataFrame({"size": sizes})
    for name in STARTS:
        table[name] = (requests - hits[name][sizes]).astype(float)
    if not popular_SE.any():
        table["popularity"] = np.nan
    return Loads(prefix, sequences, int((counted_T & after_T).sum()), requests, table)


def _places(first: Accesses | None, rest: Accesses) -> Ints:
    """Where each request of the rest stands in the stack of the least recently used."""
    if first is None:
        return stack_places(rest, recency(rest))
    ids = np.concatenate([first.expert_ids, rest.expert_ids])
    starts = np.concatenate([first.starts, rest.starts[1:] + len(first.expert_ids)])
    both = Accesses(rest.experts, ids, starts)
    return stack_places(both, recency(both))[len(first.expert_ids) :]


def _singles(order_E: NDArray[np.intp], experts: int) -> Accesses:
    """One expert after another, the most important last: a cache of M then holds the first M."""
    return Accesses(experts, order_E.astype(np.int64), np.arange(experts + 1))


def _part(asked: Accesses, begin: int, end: int) -> Accesses:
    starts = asked.starts[begin : end + 1]
    ids = asked.expert_ids[starts[0] : starts[-1]]
    return Accesses(asked.experts, ids, starts - starts[0])


def _only(asked: Accesses, is_in_A: NDArray[np.bool_]) -> Accesses:
    sizes = np.diff(asked.starts)[is_in_A]
    ids = asked.expert_ids[is_in_A[asked.of_requests()]]
    return Accesses(asked.experts, ids, np.concatenate([[0], np.cumsum(sizes)]))
