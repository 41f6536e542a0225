"""The routers of a synthetic run: logits, and who is chosen.

    score = popularity + (1 - c) (domain + topic) + c token        (c: context_independence)
    logits = score + (1 - c) noise                                 noise: standard Gumbel

A token's choices are the k largest logits. With Gumbel noise that is drawing k experts one after
the other without replacement, by the softmax of the scores over 1 - c (Plackett-Luce). Planted
experts are taken out of this race by coins (`plants`); then the logits of those who come in and of
those who go out for them are exchanged, so that the k largest are those chosen, and entropy,
margin and runners-up are of the very logits that decide.

T tokens, K choices of a token, E experts, G domains, Q topics, V token ids, R width of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.synthetic import plants
from moe_lens.trace.synthetic.plants import Coins
from moe_lens.trace.synthetic.spec import Spec

Floats = NDArray[np.float32]

LEAST = np.float32(1e-8)
"""Of an exponential draw, which may round to 0."""

DEAD = -40.0
"""The score of a dead expert: e ** -40 of the others' rate."""

TOKEN_WIDTH = 16
TOKEN_STRENGTH = float(np.pi / np.sqrt(6))
"""Standard deviation of the token's part: that of the noise whose place it takes."""


@dataclass(frozen=True)
class Context:
    """What is known of the tokens before their routers decide."""

    domain_T: NDArray[Any]
    topic_T: NDArray[Any]
    token_id_T: NDArray[Any]


class Routers:
    """The routers of all layers, made from the spec's seed."""

    def __init__(self, spec: Spec) -> None:
        self.spec = s = spec
        rng = np.random.default_rng([s.seed, 3])
        knots = 1 if s.drift is None else 1 + len(s.drift.at)
        self._score_LJE = np.stack([_popularity(s, i, knots, rng) for i in range(s.layers)])
        V = max(d.vocabulary for d in s.domains)
        normal = rng.standard_normal
        self.domain_LGE = s.domain_strength * normal((s.layers, len(s.domains), s.experts))
        self.topic_LQE = s.topic_strength * normal((s.layers, s.topics, s.experts))
        self._token_VR = normal((V, TOKEN_WIDTH), np.float32)
        self._token_LRE = normal((s.layers, TOKEN_WIDTH, s.experts), np.float32)
        self._token_LRE *= np.float32(TOKEN_STRENGTH / np.sqrt(TOKEN_WIDTH))
        self._coins = [s.coins(i) for i in range(s.layers)]
        self._turns_LE = [rng.permutation(self._free(i)) for i in range(s.layers)]

    def _free(self, layer: int) -> list[int]:
        here = plants.here(self.spec.planted, layer)
        taken = {e for p in here for e in plants.experts_of(p)}
        return [e for e in range(self.spec.experts) if e not in taken]

    def popularity(self, layer: int, index: int) -> NDArray[np.float64]:
        """`[E]`: the experts' scores in forward `index` of the run, before any context."""
        drift, score_JE = self.spec.drift, self._score_LJE[layer]
        if drift is None:
            out_E: NDArray[np.float64] = score_JE[0].copy()
        else:
            at = np.array((0, *drift.at))
            j = int(np.searchsorted(at, index, side="right")) - 1
            out_E = score_JE[j].copy()
            if drift.linear and j + 1 < len(at):
                part = (index - at[j]) / (at[j + 1] - at[j])
                rate_E = (1 - part) * np.exp(score_JE[j]) + part * np.exp(score_JE[j + 1])
                out_E[:] = np.log(rate_E)
        for p in plants.here(self.spec.planted, layer):
            if isinstance(p, plants.Dead):
                out_E[p.expert] = DEAD
        return out_E

    def burst(self, layer: int, index: int) -> int:
        """The expert that is hot in forward `index` alone; -1: none."""
        burst = self.spec.burst
        if burst is None or index % burst.every:
            return -1
        turns = self._turns_LE[layer]
        return int(turns[index // burst.every % len(turns)])

    def coins(self, layer: int, index: int) -> Coins:
        """What is in by a coin in forward `index`."""
        coins, hot = self._coins[layer], self.burst(layer, index)
        if hot < 0:
            return coins
        assert self.spec.burst is not None
        share_G = np.full(len(self.spec.domains), self.spec.burst.share)
        return replace(coins, single=[*coins.single, (hot, share_G)])

    def choose(
        self, layer: int, index: int, context: Context, rng: np.random.Generator
    ) -> tuple[Floats, Floats]:
        """Logits `[T, E]` as the race gives them, and the same with the coins applied.

        The k largest of the second are chosen. One array where nothing is planted.
        """
        score_TE, c = self._score(layer, index, context), self.spec.context_independence
        if c == 1:
            return (logits_TE := numbered(score_TE.copy()), logits_TE)
        noise_TE = rng.standard_exponential(score_TE.shape, np.float32)
        np.maximum(noise_TE, LEAST, out=noise_TE)
        np.log(noise_TE, out=noise_TE)
        if c > 0:
            noise_TE *= np.float32(1 - c)
        logits_TE = numbered(np.subtract(score_TE, noise_TE, out=noise_TE))
        coins = self.coins(layer, index)
        if not coins:
            return logits_TE, logits_TE
        forced_TE = plants.force(logits_TE, coins, context.domain_T, rng)
        return logits_TE, numbered(forced_TE)

    def _score(self, layer: int, index: int, context: Context) -> Floats:
        s, T = self.spec, len(context.domain_T)
        c = s.context_independence
        score_TE = np.broadcast_to(self.popularity(layer, index).astype(np.float32), (T, s.experts))
        if s.domain_strength and c < 1:
            part_GE = ((1 - c) * self.domain_LGE[layer]).astype(np.float32)
            score_TE = score_TE + part_GE[context.domain_T]
        if s.topic_strength and c < 1:
            part_QE = ((1 - c) * self.topic_LQE[layer]).astype(np.float32)
            score_TE = score_TE + part_QE[context.topic_T]
        if c > 0:
            score_TE = score_TE + np.float32(c) * self.token(layer, context.token_id_T)
        return score_TE

    def token(self, layer: int, token_id_T: NDArray[Any]) -> Floats:
        """`[T, E]`: what token ids add, in full."""
        ids, at_T = np.unique(token_id_T, return_inverse=True)
        # Each id once, alone: a product of many rows need not give each row the same bits.
        part: Floats = np.einsum("vr,re->ve", self._token_VR[ids], self._token_LRE[layer])
        return part[at_T]


def _popularity(s: Spec, layer: int, knots: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`[J, E]`: log rates at the start and at each knot of the drift, mean rate 1.

    Rates of one knot and the next do not correlate, or below 0.
    """
    skew = s.skew_of(layer)
    if s.popularity == "zipf":
        score_E = -skew * np.log(np.arange(1.0, s.experts + 1))
    elif s.popularity == "lognormal":
        score_E = skew * rng.standard_normal(s.experts)
    else:
        score_E = np.zeros(s.experts)
    score_E -= np.log(np.exp(score_E).mean())
    dealt = [rng.permutation(score_E)]
    while len(dealt) < knots:
        again_E = rng.permutation(score_E)
        # A change that nobody can see is none: who was popular must not be so once more.
        if (np.exp(again_E) - 1) @ (np.exp(dealt[-1]) - 1) <= 1e-9:
            dealt.append(again_E)
    return np.stack(dealt)


def numbered(logits_TE: Floats) -> Floats:
    """Puts each expert's number into the lowest bits of its logit, in place.

    So no two are equal, and one sort of the values gives the order of the experts. A logit changes
    by less than 2 ** -16 of itself at 128 experts.
    """
    E = logits_TE.shape[1]
    words_TE = logits_TE.view(np.uint32)
    words_TE &= np.uint32(~_mask(E) & 0xFFFFFFFF)
    words_TE |= np.arange(E, dtype=np.uint32)
    return logits_TE


def _mask(experts: int) -> int:
    return int((1 << (experts - 1).bit_length()) - 1)


def top(logits_TE: Floats, n: int) -> tuple[Floats, NDArray[np.int32]]:
    """The n largest of each row, best first: their logits and experts, `[T, n]`."""
    E = logits_TE.shape[1]
    best_TN = np.ascontiguousarray(np.sort(logits_TE, axis=1)[:, E - n :][:, ::-1])
    return best_TN, (best_TN.view(np.uint32) & np.uint32(_mask(E))).astype(np.int32)


Settled = tuple[Floats, Floats, NDArray[np.int32]]
"""Logits `[T, E]`; of the best `[T, N]` of each token, best first: the logit, the expert."""


def settle(logits_TE: Floats, forced_TE: Floats, k: int) -> Settled:
    """Logits whose k largest are those that the coins chose.

    Whoever comes in and whoever goes out for it exchange their logits: a token has the same ones as
    before, dealt out otherwise.

    Returns:
        The logits, and of the k + 1 largest (k where there are no more) logit and expert.
    """
    E = logits_TE.shape[1]
    best_TN, ids_TN = top(logits_TE, min(k + 1, E))
    if forced_TE is logits_TE:
        return logits_TE, best_TN, ids_TN
    natural_TE = logits_TE >= best_TN[:, k - 1 : k]
    chosen_TE = forced_TE >= top(forced_TE, k)[0][:, k - 1 :]
    # As many of the one as of the other in each row, so the n-th of both lists are of one row.
    enters = np.flatnonzero(chosen_TE & ~natural_TE)
    leaves = np.flatnonzero(natural_TE & ~chosen_TE)
    dealt = logits_TE.ravel().copy()
    dealt[enters], dealt[leaves] = dealt[leaves], dealt[enters]
    holder = np.tile(np.arange(E, dtype=np.int32), len(logits_TE))
    holder[enters], holder[leaves] = leaves % E, enters % E
    ids_TN = np.take_along_axis(holder.reshape(logits_TE.shape), ids_TN, 1)
    return dealt.reshape(logits_TE.shape), best_TN, ids_TN
