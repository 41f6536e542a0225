"""Forwards of a synthetic run as capture would hand them to the writer.

T tokens, K choices of a token, E experts, G domains (the tags), B sequences, S their tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.trace.events import (
    Forward,
    LayerCounts,
    LayerRows,
    Losses,
    SequenceRow,
    TokenRows,
)
from moe_lens.trace.synthetic.router import Context, Floats, Routers, Settled, settle, top
from moe_lens.trace.synthetic.schedule import Batch, Moment
from moe_lens.trace.synthetic.spec import Spec


def context_of(spec: Spec, batch: Batch, moment: Moment) -> Context:
    """The tokens of a forward, sequence after sequence."""
    here = slice(moment.first, moment.first + moment.length)
    return Context(
        np.repeat(batch.domain_B, moment.length),
        batch.topic_BS[:, here].ravel(),
        batch.token_id_BS[:, here].ravel(),
    )


def noise_of(spec: Spec, rank: int, moment: Moment) -> np.random.Generator:
    """The source of all that is random in a forward's routing."""
    return np.random.default_rng([spec.seed, 4, rank, moment.index])


def count(routers: Routers, batch: Batch, moment: Moment, rank: int) -> NDArray[np.int64]:
    """`[L, E]`: choices of each expert in one forward of one rank."""
    s = routers.spec
    context, rng = context_of(s, batch, moment), noise_of(s, rank, moment)
    out_LE = np.empty((s.layers, s.experts), np.int64)
    for layer in range(s.layers):
        _, forced_TE = routers.choose(layer, moment.index, context, rng)
        out_LE[layer] = np.bincount(top(forced_TE, s.top_k)[1].ravel(), minlength=s.experts)
    return out_LE


def forward(routers: Routers, batch: Batch, moment: Moment, rank: int) -> Forward:
    """One forward of one rank, with everything in it."""
    s = routers.spec
    context, rng = context_of(s, batch, moment), noise_of(s, rank, moment)
    tags = list(s.shares)
    sequences_G = np.bincount(batch.domain_B, minlength=len(tags))
    out = Forward(
        step=moment.step,
        forward=moment.forward,
        phase=moment.phase,
        t_start_ns=moment.t_start_ns,
        host_ns=moment.host_ns,
        tags=tags,
        tokens_G=sequences_G * moment.length,
        sequences_G=sequences_G,
        sampled=s.rows,
        fires_expected=s.layers,
        fires_seen=s.layers,
    )
    for layer in range(s.layers):
        logits_TE, forced_TE = routers.choose(layer, moment.index, context, rng)
        settled = settle(logits_TE, forced_TE, s.top_k)
        out.layers.append(_layer(s, layer, settled, batch, moment))
    if s.rows:
        out.tokens = [_tokens(s, batch, moment, context)]
    if s.rows and moment.first == 0:
        serving = moment.phase == "prefill"
        out.sequences = [
            SequenceRow(n, tags[g], f"rank{rank}-request{n}" if serving else None,
                        keys=_keys(s, rank, n))
            for n, g in zip(_numbers(s, batch).tolist(), batch.domain_B.tolist(), strict=True)
        ]  # fmt: skip
    return out


def _keys(spec: Spec, rank: int, sequence: int) -> dict[str, str | None]:
    """Which pair a sequence belongs to."""
    if not spec.pairs:
        return {}
    return {"pair": f"rank{rank}-{sequence // 2}", "variant": "ab"[sequence % 2]}


def losses(spec: Spec, batch: Batch, moment: Moment) -> Losses:
    """The losses of a forward: position i predicts the token id at i + 1."""
    B, S = spec.sequences, moment.length
    loss_BS = batch.surprise_BS[:, moment.first + 1 : moment.first + S + 1]
    tags = list(spec.shares)
    return Losses(
        step=moment.step,
        forward=moment.forward,
        tags=tags,
        loss_sum_G=_sums(batch.domain_B, loss_BS.sum(1, dtype=np.float64), len(tags)),
        loss_tokens_G=np.bincount(batch.domain_B, minlength=len(tags)) * S,
        sequence_N=np.repeat(_numbers(spec, batch), S),
        position_N=np.tile(np.arange(moment.first, moment.first + S, dtype=np.int32), B),
        loss_N=loss_BS.ravel(),
    )


def _numbers(spec: Spec, batch: Batch) -> NDArray[np.int64]:
    """`[B]`: numbers of the sequences on their rank."""
    return batch.number * spec.sequences + np.arange(spec.sequences)


def _tokens(spec: Spec, batch: Batch, moment: Moment, context: Context) -> TokenRows:
    S = moment.length
    positions = np.arange(moment.first, moment.first + S, dtype=np.int32)
    T = spec.sequences * S
    return TokenRows(
        stream="main",
        token_N=np.arange(T, dtype=np.int32),
        sequence_N=np.repeat(_numbers(spec, batch), S),
        position_N=np.tile(positions, spec.sequences),
        padding_N=np.zeros(T, bool),
        tag_N=context.domain_T.astype(np.int32),
        token_id_N=context.token_id_T,
    )


def capacity(spec: Spec, tokens: int) -> int | None:
    """Choices that one expert takes of a forward's tokens; None: all."""
    if spec.capacity_factor is None:
        return None
    # Rounded first: 1.1 * 40 is 44.00000000000001, and its ceiling 45.
    return math.ceil(round(spec.capacity_factor * tokens * spec.top_k / spec.experts, 9))


def overflow(ids_TK: NDArray[np.int32], room: int) -> NDArray[np.bool_]:
    """`[T, K]`: the choices beyond the first `room` of an expert, in the order of tokens."""
    flat = ids_TK.ravel()
    order = np.argsort(flat.astype(np.uint16), kind="stable")  # of 16 bits: sorted by radix
    count_E = np.bincount(flat)
    start_E = np.cumsum(count_E) - count_E
    place = np.empty(len(flat), np.int64)
    place[order] = np.arange(len(flat)) - start_E[flat[order]]
    return (place >= room).reshape(ids_TK.shape)


def _layer(s: Spec, layer: int, settled: Settled, batch: Batch, moment: Moment) -> LayerCounts:
    logits_TE, best_TN, ids_TN = settled
    T, E, K, G = len(logits_TE), s.experts, s.top_k, len(s.domains)
    ids_TK = ids_TN[:, :K]
    prob_TE = np.exp(logits_TE - best_TN[:, :1])
    sum_T1 = prob_TE.sum(1, keepdims=True)
    prob_TE /= sum_T1
    lse_T = (best_TN[:, :1] + np.log(sum_T1))[:, 0]
    entropy_T = lse_T - np.einsum("te,te->t", prob_TE, logits_TE)
    group_entropy_T = _group_entropy(prob_TE, s.groups)
    prob_TN = np.exp(best_TN - lse_T[:, None])
    weights_TN = prob_TN / prob_TN[:, :K].sum(1, keepdims=True)
    weights_TK = np.ascontiguousarray(weights_TN[:, :K])
    tag_T = np.repeat(batch.domain_B, moment.length)
    cell_TK = tag_T[:, None] * E + ids_TK
    routed_GE = np.bincount(cell_TK.ravel(), minlength=G * E).reshape(G, E)

    def by_tag(x_TX: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over the tokens of each tag, `[G, ...]`."""
        per_B = x_TX.reshape(-1, moment.length, *x_TX.shape[1:]).sum(1, dtype=np.float64)
        out = np.zeros((G, *x_TX.shape[1:]))
        np.add.at(out, batch.domain_B, per_B)
        return out

    out = LayerCounts(
        layer=layer,
        tokens=T,
        padding_tokens=0,
        tokens_G=np.bincount(tag_T, minlength=G),
        routed_GE=routed_GE,
        processed_GE=routed_GE,
        weight_sum_GE=_sums(cell_TK, weights_TK, G * E).reshape(G, E),
        prob_sum_GE=by_tag(prob_TE),
        entropy_sum_G=by_tag(entropy_T),
        top1_prob_sum_G=by_tag(prob_TN[:, 0]),
        zloss_sum_G=by_tag(lse_T**2),
        group_entropy_sum_G=None if group_entropy_T is None else by_tag(group_entropy_T),
        top_k=K,
    )
    if s.rows:
        out.rows = LayerRows(
            token_N=np.arange(T, dtype=np.int32),
            expert_ids_NK=np.ascontiguousarray(ids_TK),
            weights_NK=weights_TK,
            entropy_N=entropy_T,
            group_entropy_N=group_entropy_T,
            logits_NE=logits_TE if s.logits else None,
        )
    if K < E:
        margin_T = best_TN[:, K - 1] - best_TN[:, K]
        out.margin_sum_G = by_tag(margin_T)
        if out.rows is not None:
            out.rows.margin_N = margin_T
            out.rows.next_ids_NM = np.ascontiguousarray(ids_TN[:, K:])
            out.rows.next_weights_NM = np.ascontiguousarray(weights_TN[:, K:])
    room = capacity(s, T)
    if room is not None:
        _drop(out, overflow(ids_TK, room), room, cell_TK, weights_TK, tag_T)
    return out


def _group_entropy(prob_TE: Floats, groups: int | None) -> Floats | None:
    """`[T]`: entropy of the probabilities' sums over groups, nats; None: there are none."""
    if groups is None or groups == 1:
        return None
    q_Tg = prob_TE.reshape(len(prob_TE), groups, -1).sum(2)
    out_T: Floats = -(q_Tg * np.log(q_Tg)).sum(1)  # a softmax: none is 0
    return out_T


def _drop(
    out: LayerCounts,
    over_TK: NDArray[np.bool_],
    room: int,
    cell_TK: NDArray[np.int64],
    weights_TK: Floats,
    tag_T: NDArray[np.int64],
) -> None:
    """Nobody computes what found its expert full."""
    G, E = out.routed_GE.shape
    over_GE = np.bincount(cell_TK[over_TK], minlength=G * E).reshape(G, E)
    lost = _sums(cell_TK[over_TK], weights_TK[over_TK], G * E).reshape(G, E)
    out.capacity = room
    out.processed_GE = out.routed_GE - over_GE
    out.overflowed_GE, out.dropped_GE = over_GE, over_GE
    assert out.weight_sum_GE is not None  # a synthetic router has weights
    out.weight_sum_GE = out.weight_sum_GE - lost
    out.unserved_G = np.bincount(tag_T[over_TK.all(1)], minlength=G)
    if out.rows is not None:
        out.rows.dropped_NK = over_TK


def _sums(at: NDArray[Any], x: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Sums of `x` by number, `[n]`."""
    return np.bincount(at.ravel(), x.ravel(), n).astype(np.float64)
