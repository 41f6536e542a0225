"""Can a spec be: every mistake in one, said in a line with the value it has.

Raises ValueError, as the options of `record` do.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.trace.schema import MAX_TAGS
from moe_lens.trace.synthetic import plants
from moe_lens.trace.synthetic.plants import KINDS, Pair, Plant, Specialist

if TYPE_CHECKING:
    from moe_lens.trace.synthetic.spec import Spec

PHASES = ("train", "eval", "serve")
POPULARITIES = ("uniform", "zipf", "lognormal")
MOST_EXPERTS = 4096
"""An expert's number stands in the low bits of its logit (`router`): more would change it."""


def check(s: Spec) -> None:
    """Raise ValueError for the first thing that cannot be."""
    _sizes(s)
    _texts(s)
    _routing(s)
    _planted(s)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _between(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    _require(low <= value <= high, f"{name} is from {low:g} to {high:g}, got {value:g}.")


def _positive(name: str, value: float, *, zero: bool = False) -> None:
    good = math.isfinite(value) and (value > 0 or (zero and value == 0))
    _require(good, f"{name} is {'0 or more' if zero else 'above 0'}, got {value:g}.")


def _sizes(s: Spec) -> None:
    for name in ("layers", "experts", "top_k", "steps", "forwards", "sequences", "length", "ranks"):
        value = getattr(s, name)
        _require(value >= 1, f"{name} is 1 or more, got {value}.")
    _require(s.topics >= 1, f"topics is 1 or more (1: none differs), got {s.topics}.")
    _require(s.decode >= 0, f"decode is 0 or more forwards, got {s.decode}.")
    _require(s.experts <= MOST_EXPERTS, f"experts is at most {MOST_EXPERTS}, got {s.experts}.")
    _require(
        s.top_k <= s.experts, f"top_k is at most the number of experts, {s.experts}; got {s.top_k}."
    )
    if s.capacity_factor is not None:
        _positive("capacity_factor", s.capacity_factor)
    _require(
        s.groups is None or (s.groups >= 1 and s.experts % s.groups == 0),
        f"groups divides the {s.experts} experts into equal parts, got {s.groups}.",
    )
    _require(s.pairs >= 0, f"pairs is 0 (none) or the blocks of a prompt, got {s.pairs}.")
    if s.pairs:
        _require(
            s.sequences % 2 == 0, f"pairs need an even number of sequences, got {s.sequences}."
        )
        _require(
            s.length % s.pairs == 0,
            f"pairs divides the {s.length} tokens of a sequence into equal blocks, got {s.pairs}.",
        )
    _require(not s.logits or s.rows, "logits are per-token rows: they need rows=True.")


def _texts(s: Spec) -> None:
    known = ", ".join(PHASES)
    _require(bool(s.phases), f"phases names at least one of {known}.")
    for phase in s.phases:
        _require(phase in PHASES, f"There is no phase {phase!r}: it is one of {known}.")
    _require(1 <= len(s.domains) <= MAX_TAGS, f"domains are 1 to {MAX_TAGS}, got {len(s.domains)}.")
    for d in s.domains:
        twice = sum(d.name == x.name for x in s.domains) > 1
        _require(not twice, f"Two domains have the name {d.name!r}.")
        _positive(f"The share of domain {d.name!r}", d.share)
        _positive(f"The vocabulary of domain {d.name!r}", d.vocabulary)
        _positive(f"The Zipf exponent of domain {d.name!r}", d.zipf, zero=True)


def _routing(s: Spec) -> None:
    for name in ("domain_strength", "topic_strength"):
        _positive(name, getattr(s, name), zero=True)
    _between("stay", s.stay)
    _between("context_independence", s.context_independence)
    known = ", ".join(POPULARITIES)
    _require(s.popularity in POPULARITIES, f"popularity is one of {known}, got {s.popularity!r}.")
    _require(
        not isinstance(s.skew, tuple) or len(s.skew) == s.layers,
        f"skew is one number or one for each of {s.layers} layers, got {s.skew}.",
    )
    for skew in s.skew if isinstance(s.skew, tuple) else (s.skew,):
        _positive("skew", skew, zero=True)
    if s.drift is not None:
        at = s.drift.at
        _require(
            bool(at) and at[0] > 0 and all(a < b for a, b in pairwise(at)),
            f"drift.at holds forwards above 0, ascending, got {at}.",
        )
        _require(s.popularity != "uniform", "drift needs a popularity that is not uniform.")
    if s.burst is not None:
        _between("burst.share", s.burst.share)
        _require(s.burst.every >= 1, f"burst.every is 1 or more, got {s.burst.every}.")
    _require(
        s.context_independence < 1 or (s.burst is None and not _by_coin(s)),
        "With context_independence=1 the token id alone decides: there can be dead experts, but "
        "nothing else is planted.",
    )


def _by_coin(s: Spec) -> bool:
    return any(not isinstance(p, plants.Dead) for p in s.planted)


def _planted(s: Spec) -> None:
    for p in s.planted:
        _require(isinstance(p, KINDS), f"planted holds Hot, Dead, Pair, …, got {p!r}.")
        for layer in p.layers or ():
            _require(0 <= layer < s.layers, f"{p}: there is no layer {layer} of {s.layers}.")
        for e in plants.experts_of(p):
            _require(0 <= e < s.experts, f"{p}: there is no expert {e} of {s.experts}.")
        _stated(s, p)
    for layer in range(s.layers):
        _fits(s, layer)


def _stated(s: Spec, p: Plant) -> None:
    """Its numbers are probabilities."""
    share = getattr(p, "share", None)
    if share is not None:
        _between(f"{p}: share", share)
        _positive(f"{p}: share (an expert that nobody chooses is Dead)", share)
    if isinstance(p, Pair):
        _between(f"{p}: together", p.together)
        lone = plants.alone(s.top_k / s.experts if share is None else share, p.together)
        _require(lone <= 1, f"{p}: together is too low for experts of so large a share.")
    if isinstance(p, Specialist):
        names = ", ".join(s.shares)
        _require(p.domain in s.shares, f"{p}: the domains are {names}.")
        _require(p.lift >= 0, f"{p}: lift is 0 or more.")
        ((_, by_domain),) = plants.coins([p], s.top_k, s.experts, s.shares).single
        most = min(1 / s.shares[p.domain], s.experts / s.top_k if share is None else 1 / share)
        good = by_domain.min() >= -1e-12 and by_domain.max() <= 1 + 1e-12
        _require(bool(good), f"{p}: with these shares the lift is at most {most:g}.")


def _fits(s: Spec, layer: int) -> None:
    """No expert is planted twice in the layer, and there are places and experts enough."""
    here = plants.here(s.planted, layer)
    for e, n in Counter(e for p in here for e in plants.experts_of(p)).items():
        twice = " and ".join(type(p).__name__ for p in here if e in plants.experts_of(p))
        _require(n == 1, f"Expert {e} is planted {n} times in layer {layer}: {twice}.")
    coins = s.coins(layer)
    for members, mean in coins.committees:
        _require(
            np.ceil(mean) <= len(members),
            f"A committee of {len(members)} cannot take {mean:g} of a token's {s.top_k} places.",
        )
    most = coins.most + (s.burst is not None)
    _require(
        most <= s.top_k,
        f"What is planted in layer {layer} may take {most} places of a token, top_k is {s.top_k}.",
    )
    dead = sum(isinstance(p, plants.Dead) for p in here)
    free = s.experts - dead - len(coins.experts) - (s.burst is not None)
    least = sum(int(np.floor(mean)) for _, mean in coins.committees)
    _require(
        free >= s.top_k - least,
        f"Layer {layer} has {free} experts that are not planted, too few for top-{s.top_k}.",
    )
