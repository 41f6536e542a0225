"""Hit rates of a cache of experts, for every size and several policies, from one pass each.

The setting: of a layer's E experts, M are on the device. An access (the experts of a token, or of a
forward: `Accesses`) needs all of its experts there while it runs, so those that are missing are
loaded, and others leave; never one of the access itself. M therefore runs from the largest access
to E. hit rate = requests that find their expert / requests (0 to 1).

Legend: A accesses, N requests, E experts, M size of the cache in experts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_lens.metrics.accesses import Accesses, Ints
from moe_lens.metrics.stack import hits_by_size, stack_places

Floats = NDArray[np.float64]

POLICIES = ("lru", "lfu", "static", "static_hindsight", "optimum")


def hit_rates(asked: Accesses, first: int = 0) -> pd.DataFrame:
    """The hit rate of each policy at each size, counted from access `first` on.

    Every cache starts empty; what is before `first` fills it, and is what `static` is fitted on. An
    expert that is asked for the first time is missing, whatever the policy.

    - lru: the least recently used leaves first.
    - lfu: the least often requested since the beginning leaves first, whether it was resident or
      not; then the least recently used.
    - static: the least popular before `first` leaves first, so that the most popular stay.
      `static_hindsight` is the same, fitted on the very accesses that are counted.
    - optimum: Belady's, which evicts what is needed again last (IBM Systems Journal 5, 1966), and
      which may hold any experts at `first`. No policy has more hits.

    Ties: the higher expert id leaves first. At M = k, the largest access, where all accesses are
    as large, every policy holds the last access alone, and the hit rate is the share of requests
    that repeat it (the optimum finds the first access too).

    Args:
        asked: The accesses of one layer.
        first: Number of the first access that counts.

    Returns:
        A row a size: `size` (M, experts), `resident` (M / E), one column a policy, and `chance`
        (M / E): a uniform router that forgets finds so many. Null where nothing was requested, and
        `static` is null where nothing came before. No rows where an access was never made.
    """
    counted = asked.since(first)
    smallest, experts = asked.largest, asked.experts
    begin = int(asked.starts[first])
    sizes = np.arange(smallest, experts + 1) if asked.requests else np.zeros(0, np.int64)
    before = popularity(asked.expert_ids[:begin], experts)
    hindsight = popularity(counted.expert_ids, experts)
    hits = {
        "lru": _stack_hits(asked, recency(asked), begin),
        "lfu": _stack_hits(asked, frequency(asked), begin),
        "static": _stack_hits(asked, before[asked.expert_ids], begin),
        "static_hindsight": _stack_hits(asked, hindsight[asked.expert_ids], begin),
        "optimum": optimum_hits(counted),
    }
    total = counted.requests or np.nan
    rates = pd.DataFrame({"size": sizes, "resident": sizes / experts})
    for name in POLICIES:
        rates[name] = hits[name][sizes] / total
    if begin == 0:
        rates["static"] = np.nan
    return rates.assign(chance=rates["resident"])


def recency(asked: Accesses) -> Ints:
    """`[N]`: priorities of lru: the later an access, the smaller."""
    return -asked.of_requests()


def frequency(asked: Accesses) -> Ints:
    """`[N]`: priorities of lfu: the more requests up to and with this one, the smaller."""
    order = np.argsort(asked.expert_ids, kind="stable")
    ids = asked.expert_ids[order]
    begins = np.searchsorted(ids, ids, side="left")
    times = np.empty_like(order)
    times[order] = np.arange(len(order)) - begins + 1
    return -(times * (len(asked) + 1) + asked.of_requests())


def next_use(asked: Accesses) -> Ints:
    """`[N]`: priorities of the optimum: the access that needs the expert next, or A for none."""
    at = asked.of_requests()
    order = np.argsort(asked.expert_ids, kind="stable")
    ids, when = asked.expert_ids[order], at[order]
    again = np.full(len(order), len(asked), np.int64)
    if len(order):
        same = ids[:-1] == ids[1:]
        again[:-1][same] = when[1:][same]
    out = np.empty_like(again)
    out[order] = again
    return out


def popularity(expert_ids: Ints, experts: int) -> Ints:
    """`[E]`: place of each expert by requests, 0 the most; ties to the lower id."""
    counts = np.bincount(expert_ids, minlength=experts)
    places = np.empty(experts, np.int64)
    places[np.argsort(-counts, kind="stable")] = np.arange(experts)
    return places


def optimum_hits(asked: Accesses) -> Ints:
    """`[E + 1]`: the most hits that a cache of M = 0 … E can have, whatever it begins with.

    A cache that starts empty fills each place once for nothing; beginning with those very experts
    saves just these loads, and no other beginning saves more.
    """
    hits = hits_by_size(stack_places(asked, next_use(asked)), asked.experts)
    distinct = len(np.unique(asked.expert_ids))
    return hits + np.minimum(np.arange(asked.experts + 1), distinct)


def _stack_hits(asked: Accesses, priorities: Ints, begin: int) -> Ints:
    return hits_by_size(stack_places(asked, priorities)[begin:], asked.experts)
