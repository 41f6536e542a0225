"""Where an expert stands in the stack of a replacement policy: every cache size in one pass.

Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies" (IBM Systems
Journal 9, 1970): if a policy evicts by a priority that does not depend on the size of the cache,
what a cache of M holds is held by one of M + 1 too. So there is one list, the stack, whose first M
entries are the content of a cache of M, and a request for the entry at place p is a hit of every
cache larger than p. Here an access is a set of experts that must all be resident while it runs:
none of them is evicted for another.

Legend: A accesses, N requests, E experts, M size of the cache in experts.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappushpop
from itertools import pairwise

import numpy as np

from moe_lens.metrics.accesses import Accesses, Ints


def stack_places(asked: Accesses, priorities_N: Ints) -> Ints:
    """Place of each request in the stack before its access, for a cache that starts empty.

    An access keeps or loads its own experts; then those not of it leave, largest priority number
    first, until the cache is full at most. Of equal numbers the higher expert id leaves first.

    Args:
        asked: The accesses, in order.
        priorities_N: `[N]`: the number of the requested expert from this access until its next.

    Returns:
        `[N]`: places from 0; E where the expert was never asked for before. Right for caches that
        hold the largest access.
    """
    experts = asked.experts
    # A number that is an expert's alone, and says which one it is.
    keys_N = (priorities_N * experts + asked.expert_ids).tolist()
    ids_N, starts = asked.expert_ids.tolist(), asked.starts.tolist()
    places_N = [experts] * len(ids_N)
    key_of: list[int | None] = [None] * experts
    stack: list[int] = []
    for begin, end in pairwise(starts):
        # Request by the key that its expert has in the stack.
        request = {key_of[ids_N[n]]: n for n in range(begin, end)}
        size = end - begin
        out: list[int] = []  # what a cache of the size reached so far has to evict, as a heap
        for place, key in enumerate(stack):
            n = request.get(key)
            if n is not None:
                places_N[n] = place
            if place < size:
                if n is None:
                    out.append(key)
                if place == size - 1:
                    heapify(out)
            elif n is not None:
                stack[place] = heappop(out)
            elif out:
                stack[place] = heappushpop(out, key)
            else:
                break  # everything asked for was found: the rest stays as it was
        stack[:size] = keys_N[begin:end]
        # What was asked for the first time made the stack longer: room for what was to be evicted.
        stack.extend(sorted(out))
        for n in range(begin, end):
            key_of[ids_N[n]] = keys_N[n]
    return np.array(places_N, np.int64)


def hits_by_size(places: Ints, experts: int) -> Ints:
    """`[E + 1]`: requests that a cache of M = 0 … E finds."""
    return np.concatenate([[0], np.cumsum(np.bincount(places, minlength=experts + 1)[:experts])])
