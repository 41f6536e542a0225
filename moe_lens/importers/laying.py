"""Passes side by side as one event of the trace's writer: their counts, and their tokens' rows.

F passes, N tokens of all of them, L layers of one kind, K choices of a token, V outputs of a router
(experts, and those that compute nothing), G tags.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import ImportRefused
from moe_lens.importers.checks import Ids, as_ids, check_ids, check_weights
from moe_lens.importers.confidence import confidence, sums
from moe_lens.importers.source import Choices, Counted, Pass, Tokens
from moe_lens.trace.events import Forward, LayerCounts, LayerRows, TokenRows, loads
from moe_lens.trace.meta import LayerInfo


@dataclass(frozen=True)
class Beside:
    """The tokens of passes, side by side.

    Attributes:
        where: The place of the first pass, for errors.
        passes: F of them.
        forward_N: Which pass each token is of; None: there is one pass.
        token_N: Place of each token in its pass.
        tags: G of them.
        tag_N: Index into `tags`.
        valid_N: False: padding.
    """

    where: str
    passes: list[Pass]
    forward_N: Ids | None
    token_N: Ids
    tags: list[str]
    tag_N: NDArray[np.int64]
    valid_N: NDArray[np.bool_]


def beside(
    passes: list[Pass], tokens_F: list[int], tags: list[str], at_F: list[list[int]], where: str
) -> Beside:
    """Lay tokens side by side.

    Args:
        passes: Either all tell whose tokens they have, or none does.
        tokens_F: Tokens of each pass.
        tags: Of all of them.
        at_F: For each pass: the index into `tags` of each tag that its tokens may name.
        where: The place of the first pass, for errors.
    """
    tag, valid = [], []
    for p, T, at in zip(passes, tokens_F, at_F, strict=True):
        tag_T = None if p.tokens is None else p.tokens.tag_T
        padding_T = None if p.tokens is None else p.tokens.padding_T
        tag.append(np.full(T, at[0]) if tag_T is None else np.array(at)[tag_T])
        valid.append(np.ones(T, bool) if padding_T is None else ~padding_T)
    forward_N = np.repeat(np.arange(len(passes), dtype=np.int32), tokens_F)
    return Beside(
        where=where,
        passes=passes,
        forward_N=forward_N if len(passes) > 1 else None,
        token_N=joined([np.arange(T, dtype=np.int32) for T in tokens_F]),
        tags=tags,
        tag_N=joined(tag),
        valid_N=joined(valid),
    )


def forward_of(items: Sequence[Pass | Counted], tokens_F: NDArray[np.int64]) -> Forward:
    """The event of some passes, without tags, counts and rows.

    Args:
        items: One, or several of one phase that share a window.
        tokens_F: Valid tokens of each.
    """
    parts = []
    for i, x in enumerate(items):
        ran = len(x.choices if isinstance(x, Pass) else x.count_E)
        part = Forward(
            step=x.step,
            forward=x.forward,
            phase=x.phase,
            t_start_ns=x.t_start_ns if isinstance(x, Pass) else None,
            host_ns=x.host_ns if isinstance(x, Pass) else None,
            tags=[],
            tokens_G=tokens_F[i : i + 1],
            sequences_G=np.zeros(1, np.int64),
            sampled=isinstance(x, Pass),
            fires_expected=ran,
            fires_seen=ran,
        )
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    own: dict[str, Any] = {"layers": [], "tokens": [], "sequences": [], "parts": parts}
    return replace(parts[0], tokens_G=tokens_F.sum(keepdims=True), **own)


def forward_of_passes(at: Beside) -> Forward:
    """The event of passes, without its layers and the rows of new sequences."""
    F, G = len(at.passes), len(at.tags)
    pass_N = np.zeros(len(at.tag_N), np.int32) if at.forward_N is None else at.forward_N
    out = forward_of(at.passes, np.bincount(pass_N[at.valid_N], minlength=F))
    padding_F = np.bincount(pass_N[~at.valid_N], minlength=F).tolist()
    for part, padding in zip(out.parts or [out], padding_F, strict=True):
        part.padding_tokens = padding
    out.padding_tokens = sum(padding_F)
    out.tags = at.tags
    out.tokens_G = np.bincount(at.tag_N[at.valid_N], minlength=G)
    out.sequences_G = np.zeros(G, np.int64)
    told = [p.tokens for p in at.passes if p.tokens is not None]
    if told:
        rows = _token_rows(told, at)
        triples = np.stack([pass_N, at.tag_N, rows.sequence_N])[:, at.valid_N]
        out.sequences_G = np.bincount(np.unique(triples, axis=1)[1], minlength=G)
        out.tokens = [rows]
    return out


def layer_counts(infos: list[LayerInfo], at: Beside) -> Iterator[LayerCounts]:
    """Counts and rows of layers of one kind, in one array.

    Args:
        infos: Their arrays have one shape in each pass, and one width and dtype in all.
        at: The tokens; one pass alone, if it has logits or probabilities.

    Raises:
        ImportRefused: They are no choices of a router.
    """
    numbers = [info.layer for info in infos]
    of = [[p.choices[layer] for p in at.passes] for layer in numbers]
    V = infos[0].experts + infos[0].zero_experts
    dynamic = infos[0].top_k is None
    ids_LNK = np.stack([as_ids(joined([x.ids_TK for x in each]), at.where) for each in of])
    check_ids(ids_LNK, V, dynamic=dynamic, layers=numbers, where=at.where)
    chosen_LNK = ids_LNK >= 0 if dynamic else None
    weights_LNK = _weights(of, ids_LNK.shape, numbers, at.where)
    L, N, _ = ids_LNK.shape
    G = len(at.tags)
    cell_LNK = _cells(ids_LNK, at.tag_N, G, V)
    count_LGV = _count(cell_LNK, at.valid_N, chosen_LNK, None, (L, G, V))
    padding_LGV = weight_LGV = load_LFV = None
    if not at.valid_N.all():
        padding_LGV = _count(cell_LNK, ~at.valid_N, chosen_LNK, None, (L, G, V))
    if weights_LNK is not None:
        weight_LGV = _count(cell_LNK, at.valid_N, chosen_LNK, weights_LNK, (L, G, V))
    if at.forward_N is not None:
        F = len(at.passes)
        cell_LNK = _cells(ids_LNK, at.forward_N, F, V)
        load_LFV = _count(cell_LNK, at.valid_N, chosen_LNK, None, (L, F, V))
    tokens_G = np.bincount(at.tag_N[at.valid_N], minlength=G)
    valid = int(tokens_G.sum())
    for i, info in enumerate(infos):
        counts = LayerCounts(
            layer=info.layer,
            tokens=valid,
            padding_tokens=N - valid,
            tokens_G=tokens_G,
            routed_GE=count_LGV[i],
            processed_GE=count_LGV[i],
            weight_sum_GE=None if weight_LGV is None else weight_LGV[i],
            padding_GE=None if padding_LGV is None else padding_LGV[i],
            top_k=info.top_k,
            loads=None if load_LFV is None else loads(load_LFV[i]),
        )
        counts.rows = LayerRows(
            token_N=at.token_N,
            expert_ids_NK=ids_LNK[i],
            weights_NK=None if weights_LNK is None else weights_LNK[i],
            chosen_NK=None if chosen_LNK is None else chosen_LNK[i],
            forward_N=at.forward_N,
        )
        if has_outputs(of[i][0]):
            _confide(counts, of[i][0], info, V, at)
        yield counts


def counted_layers(
    infos: list[LayerInfo], tokens_FL: NDArray[np.int64], count_LFE: list[NDArray[np.int64]]
) -> Iterator[LayerCounts]:
    """Layers of which counts alone are known.

    Args:
        infos: The layers.
        tokens_FL: Tokens of each layer in each pass.
        count_LFE: For each layer: choices of each expert in each pass.
    """
    for info, n, count_FE in zip(infos, tokens_FL.sum(0).tolist(), count_LFE, strict=True):
        count_GE = count_FE.sum(0, keepdims=True)
        yield LayerCounts(
            layer=info.layer,
            tokens=n,
            padding_tokens=0,
            tokens_G=np.array([n]),
            routed_GE=count_GE,
            processed_GE=count_GE,
            weight_sum_GE=None,
            top_k=info.top_k,
            loads=loads(count_FE) if len(count_FE) > 1 else None,
        )


def has_outputs(x: Choices) -> bool:
    """More of the router is known than its choices."""
    return x.logits_TE is not None or x.prob_TE is not None


def joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """One array of all rows."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _weights(
    of: list[list[Choices]], shape: tuple[int, ...], numbers: list[int], where: str
) -> NDArray[np.float32] | None:
    """`[L, N, K]`: gate weights, if there are any."""
    parts = [[x.weights_TK for x in each if x.weights_TK is not None] for each in of]
    if not parts[0]:
        return None
    weights_LNK = np.stack([np.asarray(joined(each), np.float32) for each in parts])
    if weights_LNK.shape != shape:
        raise ImportRefused(
            f"{where}, layer {numbers[0]}: weights of {weights_LNK.shape[1:]} for choices of "
            f"{shape[1:]}."
        )
    check_weights(weights_LNK, numbers, where)
    return weights_LNK


def _cells(ids_LNK: Ids, of_N: NDArray[Any], n: int, V: int) -> NDArray[np.int64]:
    """Where each choice counts in a flat `[L, n, V]`; `of_N` says of which of `n` each token is."""
    cell_LNK = ids_LNK + (of_N.astype(np.int64) * V)[None, :, None]
    cell_LNK += (np.arange(len(ids_LNK)) * (n * V))[:, None, None]
    return cell_LNK


def _count(
    cell_LNK: NDArray[np.int64],
    of_N: NDArray[np.bool_],
    chosen_LNK: NDArray[np.bool_] | None,
    weights_LNK: NDArray[np.float32] | None,
    shape: tuple[int, int, int],
) -> NDArray[Any]:
    """Choices of some tokens, or the sums of their weights."""
    at: Any = slice(None)
    if chosen_LNK is not None:
        at = chosen_LNK & of_N[None, :, None]
    elif not of_N.all():
        at = np.broadcast_to(of_N[None, :, None], cell_LNK.shape)
    weights = None if weights_LNK is None else weights_LNK[at].ravel()
    return np.bincount(cell_LNK[at].ravel(), weights, int(np.prod(shape))).reshape(shape)


def _token_rows(told: list[Tokens], at: Beside) -> TokenRows:
    ids = [x.token_id_T for x in told if x.token_id_T is not None]
    return TokenRows(
        stream="main",
        token_N=at.token_N,
        sequence_N=np.asarray(joined([x.sequence_T for x in told]), np.int64),
        position_N=np.asarray(joined([x.position_T for x in told]), np.int32),
        padding_N=~at.valid_N,
        tag_N=at.tag_N.astype(np.int32),
        # -1 becomes null: of this token the id is not known.
        token_id_N=np.ma.masked_less(np.asarray(joined(ids), np.int32), 0) if ids else None,
        forward_N=at.forward_N,
    )


def _confide(counts: LayerCounts, x: Choices, info: LayerInfo, V: int, at: Beside) -> None:
    """Add what logits or a distribution say."""
    rows = counts.rows
    assert rows is not None
    for name, array in (("logits", x.logits_TE), ("probabilities", x.prob_TE)):
        if array is not None and array.shape != (len(rows), V):
            raise ImportRefused(
                f"{at.where}, layer {info.layer}: {name} of {array.shape}, not of {(len(rows), V)}."
            )
    G, valid_N = len(at.tags), at.valid_N
    tag_N = at.tag_N[valid_N]
    said = confidence(x, rows.expert_ids_NK, info.score)
    if x.logits_TE is not None:
        rows.logits_NE = np.asarray(x.logits_TE, np.float32)
        finite_N = np.isfinite(rows.logits_NE).all(1)
        counts.nonfinite_G = np.bincount(at.tag_N[valid_N & ~finite_N], minlength=G)
    if said.entropy_T is not None and said.prob_TV is not None:
        rows.entropy_N = said.entropy_T.astype(np.float32)
        prob_NV = np.where(np.isfinite(said.prob_TV), said.prob_TV, 0)
        prob_GV = np.zeros((G, V))
        np.add.at(prob_GV, tag_N, prob_NV[valid_N])
        counts.prob_sum_GE = prob_GV
    if said.margin_T is not None:
        rows.margin_N = said.margin_T.astype(np.float32)
        rows.next_ids_NM = said.next_ids_T1
    for name, values_N in (
        ("entropy_sum_G", said.entropy_T),
        ("top1_prob_sum_G", said.top1_T),
        ("zloss_sum_G", said.zloss_T),
        ("margin_sum_G", said.margin_T),
    ):
        setattr(counts, name, sums(None if values_N is None else values_N[valid_N], tag_N, G))
