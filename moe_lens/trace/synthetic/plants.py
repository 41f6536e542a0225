"""Experts whose part in the routing is stated: what can be planted, and how it is drawn.

A planted expert does not take part in the race for a token's k places: a coin of its own says
whether it is in. So its share is exact, whatever popularity, domains and topics do to the others.

T tokens, K choices of a token, E experts, G domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Hot:
    """An expert that `share` of the tokens choose (chance: k/E)."""

    expert: int
    share: float
    layers: tuple[int, ...] | None = None
    """Where it is planted; None: in every layer."""


@dataclass(frozen=True)
class Dead:
    """An expert that no token chooses."""

    expert: int
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pair:
    """Two experts chosen together: P(b | a) = P(a | b) = `together`, and each by `share`.

    The lift P(a, b) / (P(a) P(b)) is `together / share`. `share` None: k/E.
    """

    a: int
    b: int
    together: float
    share: float | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Committee:
    """A group that takes `share` of all choices, in every domain alike.

    Of a token's k places, floor(share k) or one more are the group's; its members race for them.
    """

    experts: tuple[int, ...]
    share: float
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Specialist:
    """An expert that tokens of `domain` choose `lift` times as often as tokens on the whole.

    `share` of all tokens choose it (None: k/E), `lift * share` of those of the domain, and as many
    of every other domain as then remain.
    """

    expert: int
    domain: str
    lift: float
    share: float | None = None
    layers: tuple[int, ...] | None = None


Plant = Hot | Dead | Pair | Committee | Specialist
KINDS = (Hot, Dead, Pair, Committee, Specialist)
P = TypeVar("P", Hot, Dead, Pair, Committee, Specialist)


def experts_of(plant: Plant) -> tuple[int, ...]:
    """The experts that it speaks for."""
    if isinstance(plant, Pair):
        return plant.a, plant.b
    return plant.experts if isinstance(plant, Committee) else (plant.expert,)


def here(plants: tuple[Plant, ...], layer: int) -> list[Plant]:
    """Those planted in a layer."""
    return [p for p in plants if p.layers is None or layer in p.layers]


@dataclass(frozen=True)
class Coins:
    """Experts of one layer in one forward that are in by a coin.

    Attributes:
        single: Expert, and by domain the probability that it is in.
        pairs: a, b, the probability of each, and that of one given the other.
        committees: Members, and how many of a token's places they take on average.
    """

    single: list[tuple[int, Doubles]]
    pairs: list[tuple[int, int, float, float]]
    committees: list[tuple[tuple[int, ...], float]]

    def __bool__(self) -> bool:
        return bool(self.single or self.pairs or self.committees)

    @property
    def experts(self) -> list[int]:
        """All of them."""
        alone = [e for e, _ in self.single] + [e for a, b, _, _ in self.pairs for e in (a, b)]
        return alone + [e for members, _ in self.committees for e in members]

    @property
    def most(self) -> int:
        """The places of a token that they take at most."""
        places = sum(int(np.ceil(mean)) for _, mean in self.committees)
        return len(self.single) + 2 * len(self.pairs) + places


def coins(plants: list[Plant], top_k: int, experts: int, shares: dict[str, float]) -> Coins:
    """The coins of a layer.

    Args:
        plants: What is planted in it.
        top_k: Of the layer.
        experts: Of the layer.
        shares: Share of each domain in the tokens.
    """
    out = Coins([], [], [])
    chance = top_k / experts
    for p in plants:
        if isinstance(p, Hot):
            out.single.append((p.expert, np.full(len(shares), p.share)))
        elif isinstance(p, Specialist):
            out.single.append((p.expert, _by_domain(p, chance, shares)))
        elif isinstance(p, Pair):
            out.pairs.append((p.a, p.b, chance if p.share is None else p.share, p.together))
        elif isinstance(p, Committee):
            # Rounded: 0.3 * 10 is 3.0000000000000004, which would take a fourth place.
            out.committees.append((p.experts, round(p.share * top_k, 9)))
    return out


def _by_domain(p: Specialist, chance: float, shares: dict[str, float]) -> Doubles:
    share = chance if p.share is None else p.share
    of = shares[p.domain]
    elsewhere = share if of == 1 else share * (1 - of * p.lift) / (1 - of)
    return np.array([p.lift * share if name == p.domain else elsewhere for name in shares])


def alone(share: float, together: float) -> float:
    """P(b | not a) of a pair, such that b is chosen by `share` of the tokens."""
    return share * (1 - together) / (1 - share) if share < 1 else 0.0


FORCED = 1000.0
"""Above all differences between logits."""


def force(
    logits_TE: NDArray[np.float32], coins: Coins, domain_T: NDArray[Any], rng: np.random.Generator
) -> NDArray[np.float32]:
    """A copy of the logits in which the coins have raised or lowered their experts."""
    out = logits_TE.copy()
    T = len(out)

    def put(expert: int, is_in_T: NDArray[np.bool_]) -> None:
        out[:, expert] += np.where(is_in_T, np.float32(FORCED), np.float32(-FORCED))

    for expert, by_domain in coins.single:
        put(expert, rng.random(T) < by_domain[domain_T])
    for a, b, share, together in coins.pairs:
        a_T = rng.random(T) < share
        put(a, a_T)
        put(b, rng.random(T) < np.where(a_T, together, alone(share, together)))
    for members, mean in coins.committees:
        places_T = np.floor(mean) + (rng.random(T) < mean % 1)
        of = np.array(members)
        rank = (-logits_TE[:, of]).argsort(1).argsort(1)
        out[:, of] += np.where(rank < places_T[:, None], np.float32(FORCED), np.float32(-FORCED))
    return out
