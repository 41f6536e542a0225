"""Which forwards a synthetic run has, and the sequences that go through them.

B sequences, S positions, G domains, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.synthetic.spec import Spec

START_NS = 1_750_000_000_000_000_000
FORWARD_NS, TOKEN_NS = 5_000_000, 10_000
"""What a forward is said to take: so much, and so much more for each token."""


@dataclass(frozen=True)
class Moment:
    """One forward of the run."""

    index: int
    """Number in the run, from 0."""
    step: int
    forward: int
    phase: str
    batch: int
    """Which batch of sequences goes through it."""
    first: int
    """Position of its first token in each of them."""
    length: int
    """Tokens of each of them."""
    t_start_ns: int
    host_ns: int


def moments(spec: Spec) -> list[Moment]:
    """All forwards in order."""
    out: list[Moment] = []
    now, batch = START_NS, 0
    for step in range(spec.steps):
        phase = spec.phases[step % len(spec.phases)]
        parts = [(phase, batch + i, 0, spec.length) for i in range(spec.forwards)]
        if phase == "serve":
            parts = [("prefill", batch, 0, spec.length)]
            parts += [("decode", batch, spec.length + i, 1) for i in range(spec.decode)]
        for forward, (name, of, first, length) in enumerate(parts):
            took = FORWARD_NS + TOKEN_NS * spec.sequences * length
            out.append(Moment(len(out), step, forward, name, of, first, length, now, took))
            now += took
        batch = parts[-1][1] + 1
    return out


@dataclass(frozen=True)
class Batch:
    """The sequences of one batch on one rank, with all that is ever read of them."""

    number: int
    domain_B: NDArray[np.int64]
    topic_BS: NDArray[np.int64]
    token_id_BS: NDArray[np.int32]
    """One more than is routed: the last position has something to predict."""
    surprise_BS: NDArray[np.float32]
    """-ln of each token id's frequency in its domain."""


class Sequences:
    """Draws batches of sequences; the same ones for the same spec, rank and number."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        rng = np.random.default_rng([spec.seed, 1])
        frequencies = [np.arange(1.0, d.vocabulary + 1) ** -d.zipf for d in spec.domains]
        self.probs = [p / p.sum() for p in frequencies]
        """By domain: probability of its token ids, the most frequent first."""
        self.ids = [rng.permutation(d.vocabulary).astype(np.int32) for d in spec.domains]
        """By domain: the ids in that order."""
        self.domain_share_G = np.array(list(spec.shares.values()))

    def batch(self, rank: int, number: int) -> Batch:
        """Batch `number` of a rank."""
        s = self.spec
        B, S = s.sequences, s.length + (s.decode if "serve" in s.phases else 0) + 1
        rng = np.random.default_rng([s.seed, 2, rank, number])
        # Drawn systematically: each batch has the shares, as nearly as whole sequences can.
        at_B = (np.arange(B) + rng.random()) / B
        domain_B = np.searchsorted(np.cumsum(self.domain_share_G), at_B).clip(0, len(s.domains) - 1)
        rng.shuffle(domain_B)
        token_id_BS = np.empty((B, S), np.int32)
        surprise_BS = np.empty((B, S), np.float32)
        for g, probs in enumerate(self.probs):
            mine = np.flatnonzero(domain_B == g)
            place = self._places(rng, g, (len(mine), S))
            token_id_BS[mine] = self.ids[g][place]
            surprise_BS[mine] = -np.log(probs)[place]
        topic_BS = sticky(rng, B, S, s.topics, s.stay)
        if s.pairs:
            first, second = slice(0, None, 2), slice(1, None, 2)
            order_S = np.append(reversed_blocks(s.length, s.pairs), np.arange(s.length, S))
            domain_B[second] = domain_B[first]
            for x_BS in (topic_BS, token_id_BS, surprise_BS):
                x_BS[second] = x_BS[first][:, order_S]
        return Batch(number, domain_B, topic_BS, token_id_BS, surprise_BS)

    def token_ids(self, rng: np.random.Generator, domain: int, n: int) -> NDArray[np.int32]:
        """`n` token ids of a domain."""
        return self.ids[domain][self._places(rng, domain, (n,))]

    def _places(
        self, rng: np.random.Generator, domain: int, shape: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """Places in the domain's order of frequency."""
        probs = self.probs[domain]
        # Sums of floats may end a little below 1.
        return np.searchsorted(np.cumsum(probs), rng.random(shape)).clip(0, len(probs) - 1)

    @property
    def loss_G(self) -> NDArray[np.float64]:
        """Mean loss of a domain: the entropy of its token ids, nats."""
        return np.array([float(-(p * np.log(p)).sum()) for p in self.probs])


def reversed_blocks(length: int, blocks: int) -> NDArray[np.int64]:
    """`[length]`: positions, cut into equal blocks, the last block first."""
    return np.concatenate(np.split(np.arange(length), blocks)[::-1])


def sticky(rng: np.random.Generator, B: int, S: int, topics: int, stay: float) -> NDArray[Any]:
    """Markov chains `[B, S]` over topics: kept with probability `stay`, else drawn anew of all."""
    drawn_BS = rng.integers(0, topics, (B, S))
    anew_BS = rng.random((B, S)) >= stay
    anew_BS[:, 0] = True
    since_BS = np.maximum.accumulate(np.where(anew_BS, np.arange(S), 0), axis=1)
    return np.take_along_axis(drawn_BS, since_BS, 1)
