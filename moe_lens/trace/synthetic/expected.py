"""The probability of each expert to be among a token's k, from the spec alone.

Exact wherever the token id has no part in the routing (context_independence 0): the race among
experts that are not planted is Plackett-Luce, and

    P(i among the first k) = integral of w_i exp(-w_i t) P(fewer than k of the others before t) dt

where w are the rates, since the order of an exponential race is that of drawing without
replacement. Elsewhere a large sample of the same draws, of a seed of its own.

L layers, G domains, E experts, K places, M races, X places on the axis of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.synthetic.plants import Coins, alone
from moe_lens.trace.synthetic.router import Context, Routers, top
from moe_lens.trace.synthetic.schedule import Sequences

Doubles = NDArray[np.float64]

SAMPLE, PART = 1 << 15, 1 << 12
"""Tokens of each domain behind a probability that is not exact (standard error below 0.003), and
how many of them are drawn at once."""


@dataclass(frozen=True)
class Expected:
    """Selection probabilities.

    Attributes:
        prob_LGE: P(expert is chosen | domain), summing to k over the experts.
        prob_LE: The same over all tokens.
        exact: Closed form; else a sample of `SAMPLE` tokens a domain.
    """

    prob_LGE: Doubles
    prob_LE: Doubles
    exact: bool


def expected(routers: Routers, index: int) -> Expected:
    """What forward `index` of the run is expected to choose."""
    s = routers.spec
    exact = s.context_independence == 0
    of = _exact if exact else _sampled
    prob_LGE = np.stack([of(routers, layer, index) for layer in range(s.layers)])
    share_G = np.array(list(s.shares.values()))
    return Expected(prob_LGE, np.einsum("g,lge->le", share_G, prob_LGE), exact)


def inclusion(score_ME: Doubles, k: int) -> Doubles:
    """`[M, E]`: P(expert is among the first k), drawing by softmax(score) without replacement."""
    M, E = score_ME.shape
    if k <= 0:
        return np.zeros((M, E))
    if k >= E:
        return np.ones((M, E))
    ahead_ME = score_ME - np.sort(score_ME, axis=1)[:, -k][:, None]
    rate_ME = np.exp(np.minimum(ahead_ME, 25.0))  # as good as certain already
    # Over the logarithm of time, where the integrand is analytic and falls off on both sides, the
    # plain sum is exact to e ** (-pi ** 2 / step). The k fastest are there in a time of order 1.
    step = 0.2
    t_X = np.exp(np.arange(-50.0, 5.0, step))
    out_ME = np.empty((M, E))
    for m, rate_E in enumerate(rate_ME):
        late_EX = np.exp(-rate_E[:, None] * t_X)
        # fewer[e, a]: P(a of the experts before e have arrived), a < k; and so from the other end
        before, after = _arrived(late_EX, k), _arrived(late_EX[::-1], k)[::-1]
        room_EXK = after.cumsum(2)[:, :, ::-1]  # at most k - 1 - a of those behind e
        fewer_EX = (before * room_EXK).sum(2)
        out_ME[m] = (rate_E[:, None] * t_X * late_EX * fewer_EX).sum(1) * step
    return out_ME


def _arrived(late_EX: Doubles, k: int) -> Doubles:
    """`[E, X, k]`: P(exactly a of the experts before e have arrived by t)."""
    E, X = late_EX.shape
    out = np.zeros((E, X, k))
    out[0, :, 0] = 1
    for e in range(E - 1):
        late_X1 = late_EX[e][:, None]
        out[e + 1] = out[e] * late_X1
        out[e + 1, :, 1:] += out[e, :, :-1] * (1 - late_X1)
    return out


def _exact(routers: Routers, layer: int, index: int) -> Doubles:
    s = routers.spec
    coins = routers.coins(layer, index)
    score_E = routers.popularity(layer, index)
    topic_QE = routers.topic_LQE[layer] if s.topic_strength else np.zeros((1, s.experts))
    domain_GE = routers.domain_LGE[layer]
    # Topics are equally likely.
    return np.stack(
        [
            _with_coins(score_E + domain_GE[g] + topic_QE, coins, g, s.top_k).mean(0)
            for g in range(len(s.domains))
        ]
    )


def _with_coins(score_ME: Doubles, coins: Coins, domain: int, k: int) -> Doubles:
    """As `inclusion`, where some experts are in by a coin and the others race for what is left."""
    out_ME = np.zeros(score_ME.shape)
    places = np.ones(1)  # probability of each number of places that coins take
    for expert, by_domain in coins.single:
        q = by_domain[domain]
        out_ME[:, expert] = q
        places = np.convolve(places, [1 - q, q])
    for a, b, share, together in coins.pairs:
        out_ME[:, [a, b]] = share
        lone = share * (1 - together) + (1 - share) * alone(share, together)
        both = share * together
        places = np.convolve(places, [1 - lone - both, lone, both])
    for members, mean in coins.committees:
        low, part = int(mean), mean % 1
        of = list(members)
        for n, probability in ((low, 1 - part), (low + 1, part)):
            if probability:
                out_ME[:, of] += probability * inclusion(score_ME[:, of], n)
        places = np.convolve(places, np.concatenate([np.zeros(low), [1 - part, part]]))
    free = np.setdiff1d(np.arange(score_ME.shape[1]), coins.experts)
    for n, probability in enumerate(places):
        if probability:
            out_ME[:, free] += probability * inclusion(score_ME[:, free], k - n)
    return out_ME


def _sampled(routers: Routers, layer: int, index: int) -> Doubles:
    s = routers.spec
    sequences = Sequences(s)
    rng = np.random.default_rng([s.seed, 5, layer, index])
    rows = []
    for g in range(len(s.domains)):
        count_E = np.zeros(s.experts, np.int64)
        for _ in range(SAMPLE // PART):
            context = Context(
                np.full(PART, g),
                rng.integers(0, s.topics, PART),
                sequences.token_ids(rng, g, PART),
            )
            _, forced_TE = routers.choose(layer, index, context, rng)
            count_E += np.bincount(top(forced_TE, s.top_k)[1].ravel(), minlength=s.experts)
        rows.append(count_E / SAMPLE)
    return np.stack(rows)
