"""How sure routers were: entropy, margin, top-1 probability and z-loss, sums by tag and rows.

This is the larger part of what capture costs, so it is written for few passes over `[L, T, E]`. On
a CPU it goes layer by layer in two arrays that it uses again and again: they stay in the
processor's cache, and fresh ones would cost as much again in page faults. On a device the number of
operations is what costs: all layers at once.

Legend: L layers, T tokens, K choices per token, E experts, G tags, N sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens_hooks.batch import Batch
from moe_lens_hooks.semantics import POSITIVE, Semantics
from moe_lens_hooks.tally import Tally

Numbers = dict[str, Tensor]

_MASKED = -1e4
"""Logits this far below a token's largest are those of masked experts."""


@dataclass
class Routers:
    """What the routers of L layers of one kind put out, and what was chosen.

    Attributes:
        logits_TE: Float, a tensor for each layer.
        bias_E: The selection bias of each layer; None: they have none.
        ids_LTK: What was chosen, in range; where a slot holds no choice, the token's first again.
        meaning: How they work.
        weights_LTK: Gate weights; None where slot 0 may hold no choice.
        present_LT: Tokens that a layer saw; None: all.
        groups: Equal groups of neighbouring experts; None: none.
    """

    logits_TE: Sequence[Tensor]
    bias_E: Sequence[Tensor] | None
    ids_LTK: Tensor
    meaning: Semantics
    weights_LTK: Tensor | None
    present_LT: Tensor | None
    groups: int | None = None

    def chunks(self) -> list[_Chunk]:
        """What is looked at at once: a layer on a CPU, all layers on a device."""
        whole = _stack(self.logits_TE) if self.ids_LTK.device.type != "cpu" else None
        if whole is not None:
            bias = None if self.bias_E is None else _stack(self.bias_E).float().unsqueeze(1)
            return [_Chunk(whole.float(), bias, self.ids_LTK, self.weights_LTK)]
        out = []
        for i, z_TE in enumerate(self.logits_TE):
            bias = None if self.bias_E is None else self.bias_E[i].detach().float()[None, None]
            weights = None if self.weights_LTK is None else self.weights_LTK[i : i + 1]
            z_1TE = z_TE.detach().unsqueeze(0).float()
            out.append(_Chunk(z_1TE, bias, self.ids_LTK[i : i + 1], weights))
        return out


@dataclass
class _Chunk:
    z_LTE: Tensor
    bias_L1E: Tensor | None
    ids_LTK: Tensor
    weights_LTK: Tensor | None


class _Room:
    """Two arrays of a chunk's size, for all chunks in turn."""

    def __init__(self, like: Tensor) -> None:
        self.below = torch.empty_like(like)
        self.exp = torch.empty_like(like)


def confidence(
    routers: Routers, batch: Batch, tally: Tally, *, rows: bool, logits: bool
) -> tuple[Numbers, Numbers]:
    """Sums by tag, named as in `LayerCounts`, and rows, named as in `LayerRows`.

    Args:
        routers: Layers of one kind.
        batch: Their tokens.
        tally: Sums by tag.
        rows: Rows of the sampled tokens are wanted.
        logits: Their logits too.
    """
    chunks = routers.chunks()
    room = _Room(chunks[0].z_LTE)
    at = batch.rows_N if rows else None
    seen = [_look(c, routers, room, tally, at, logits=logits) for c in chunks]
    whole = seen[0] if len(seen) == 1 else {n: torch.cat([s[n] for s in seen]) for n in seen[0]}
    own = {n: whole.pop(n) for n in list(whole) if n.endswith(("_N", "_NM", "_NE"))}
    counts = {n: whole.pop(n) for n in list(whole) if n.endswith("_GE")}
    finite_LT = whole.pop("finite")
    values_LTM = torch.stack(list(whole.values()), -1)
    usable_LT = finite_LT if routers.present_LT is None else finite_LT & routers.present_LT
    if values_LTM.device.type != "cpu" or not bool(usable_LT.all()):
        # 0 x NaN is NaN: tokens without finite logits must be blanked, not scaled, to zero.
        values_LTM = torch.where(usable_LT.unsqueeze(-1), values_LTM, 0.0)
        nonfinite_LT = ~finite_LT
        if routers.present_LT is not None:
            nonfinite_LT &= routers.present_LT
        counts["nonfinite_G"] = tally.valid(tally.tokens(nonfinite_LT.long()))
    sums = tally.valid(tally.tokens(values_LTM.double()))
    return counts | {f"{name}_sum_G": sums[..., i] for i, name in enumerate(whole)}, own


def _look(
    c: _Chunk, routers: Routers, room: _Room, tally: Tally, at: Tensor | None, *, logits: bool
) -> Numbers:
    """Values per token `[L, T]`, `prob_sum_GE`, and rows where `at` says which."""
    meaning = routers.meaning
    top_LT = c.z_LTE.amax(-1)
    # -inf is a legal logit (an expert masked out): its probability is 0, and 0 x -inf must be too.
    below_LTE = torch.sub(c.z_LTE, top_LT.unsqueeze(-1), out=room.below).clamp_min_(_MASKED)
    exp_LTE = torch.exp(below_LTE, out=room.exp)
    total_LT = exp_LTE.sum(-1)
    log_total_LT = total_LT.log()
    zloss_LT = (top_LT + log_total_LT).square_()
    finite_LT = zloss_LT < math.inf  # False for NaN; a third of what isfinite costs
    # On a CPU it costs nothing to look, and saves blanking what is not there.
    whole = c.z_LTE.device.type == "cpu" and bool(finite_LT.all())
    out: Numbers = {"finite": finite_LT, "zloss": zloss_LT}
    if meaning.score in POSITIVE:
        p_LTE = _positive(c.z_LTE, meaning.score, room)
        scale_LT = p_LTE.sum(-1).reciprocal_()
        mean_log_LT = torch.xlogy(p_LTE, p_LTE).sum(-1) * scale_LT
        out["entropy"] = -mean_log_LT - scale_LT.log()
        out["top1_prob"] = p_LTE.amax(-1) * scale_LT
    else:
        p_LTE, scale_LT = exp_LTE, total_LT.reciprocal()  # probabilities but for their scale
    if meaning.score is not None:
        clean_LTE = p_LTE if whole else torch.where(finite_LT.unsqueeze(-1), p_LTE, 0.0)
        clean_LT = scale_LT if whole else torch.where(finite_LT, scale_LT, 0.0)
        out["prob_sum_GE"] = tally.valid(tally.weighted(clean_LTE, clean_LT))
        if routers.groups is not None:  # before the probabilities are used up
            out["group_entropy"] = _group_entropy(p_LTE, scale_LT, routers.groups)
    if meaning.score == "softmax":
        mean_LT = exp_LTE.mul_(below_LTE).sum(-1) * scale_LT
        out["entropy"] = log_total_LT - mean_LT
        out["top1_prob"] = scale_LT
    if at is not None:
        for name in ("entropy", "group_entropy"):
            if name in out:
                out[f"{name}_N"] = torch.where(finite_LT, out[name], math.nan)[:, at]
    if at is not None and logits:
        out["logits_NE"] = c.z_LTE[:, at]
    if meaning.rank is not None:
        # A score that is the logits may stand on logits less their largest: differences are kept.
        z_LTE = below_LTE if meaning.selection == "logits" else c.z_LTE
        score_LTE = meaning.rank(z_LTE, c.bias_L1E)
        _margin(c, meaning, score_LTE, finite_LT, out, at)
    return out


def _margin(
    c: _Chunk,
    meaning: Semantics,
    score_LTE: Tensor,
    finite_LT: Tensor,
    out: Numbers,
    at: Tensor | None,
) -> None:
    """Margin and runner-up; `score_LTE` is used up."""
    wide_LTK = c.ids_LTK.long()
    chosen_LT = score_LTE.gather(-1, wide_LTK).amin(-1)
    others_LTE = score_LTE.scatter_(-1, wide_LTK, -math.inf)
    best_LT = others_LTE.amax(-1)
    # Below zero the choice was not by this score (rounding apart), and a masked expert is no
    # runner-up: then there is no margin, and the NaN makes the sum null, since a sum of some
    # of the tokens would mislead.
    margin_LT = chosen_LT - best_LT
    room_LT = 1e-5 + meaning.slack * (1 + chosen_LT.abs())
    explained_LT = (margin_LT > -room_LT) & (best_LT > _MASKED)
    out["margin"] = torch.where(explained_LT, margin_LT.clamp_min_(0.0), math.nan)
    if at is None:
        return
    margin_LN = torch.where(finite_LT, out["margin"], math.nan)[:, at]
    known_LN1 = margin_LN.isfinite().unsqueeze(-1)
    next_LN1 = others_LTE[:, at].argmax(-1, keepdim=True)
    out["margin_N"] = margin_LN
    out["next_ids_NM"] = torch.where(known_LN1, next_LN1, -1).int()
    if meaning.proportional and c.weights_LTK is not None:
        z_LNE = c.z_LTE[:, at]
        log_share_LN1 = _log(z_LNE.gather(-1, next_LN1), meaning.score)
        log_share_LN1 -= _log(z_LNE.gather(-1, wide_LTK[:, at, :1]), meaning.score)
        weight_LN1 = c.weights_LTK[:, at, :1].float() * log_share_LN1.exp_()
        out["next_weights_NM"] = torch.where(known_LN1, weight_LN1, math.nan)


def _group_entropy(p_LTE: Tensor, scale_LT: Tensor, groups: int) -> Tensor:
    """`[L, T]`: entropy of sums over groups of the probabilities, `p_LTE` but for their scale."""
    q_LTg = p_LTE.reshape(*scale_LT.shape, groups, -1).sum(-1).mul_(scale_LT.unsqueeze(-1))
    return -torch.xlogy(q_LTg, q_LTg).sum(-1)


def _positive(z_LTE: Tensor, score: str, room: _Room) -> Tensor:
    if score == "sigmoid":
        return torch.sigmoid(z_LTE, out=room.exp)
    return POSITIVE[score](z_LTE)


def _log(z: Tensor, score: str | None) -> Tensor:
    """Logarithm of a probability but for a constant of the token."""
    if score == "sigmoid":
        return torch.nn.functional.logsigmoid(z)
    return POSITIVE[score](z).log() if score in POSITIVE else z.clone()


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.detach() for p in parts])
