"""From what MoE blocks were seen to do, the numbers that are kept.

On the blocks' own device, without waiting for it. Layers of one kind are reduced together: what
capture costs on small batches is the number of operations, not their size. Values out of range are
counted and clamped, never trusted.

Legend: L layers reduced together, T tokens, K choices per token, E experts, G tags, N sampled rows.
Tokens are counted in 2 G groups: those of valid tokens by tag, then those of padding by tag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.semantics import Semantics

Numbers = dict[str, Tensor]

_MASKED = -1e4
"""Logits this far below a token's largest are those of masked experts."""


@dataclass
class Reduced:
    """Layers reduced together; the first dimension of every tensor is L.

    Attributes:
        counts: By the names of `LayerCounts`.
        rows: Of the sampled tokens, by the names of `LayerRows`; empty where none is sampled.
        problems: How many values of each layer were wrong, by what was wrong.
        notes: What a library is known to do, and for how many tokens of each layer.
    """

    counts: Numbers
    rows: Numbers
    problems: Numbers
    notes: Numbers


def reduce(
    seen: Sequence[Observed],
    batch: Batch,
    meanings: Sequence[Semantics | None],
    experts: int,
    *,
    logits: bool,
    faithful: bool = True,
) -> Reduced:
    """Counts, per-token rows and problems of layers in one forward.

    Args:
        seen: Ids and weights are there and have one shape `[T, K]`; what else was seen was seen of
            all of them or of none.
        batch: Tags, padding and sampled rows of the same T tokens.
        meanings: How each router works, all of one kind; None where logits were not seen.
        experts: E, zero experts included.
        logits: Keep the logits of sampled rows.
        faithful: The experts run what the router chooses; else rows say both.
    """
    raw_LTK = _stack([x.expert_ids_TK for x in seen])
    weights_LTK = _stack([x.weights_TK for x in seen])
    kept_LTK = None if seen[0].kept_TK is None else _stack([x.kept_TK for x in seen])
    problems = _each([x.problems for x in seen], raw_LTK)
    notes = _each([x.notes for x in seen], raw_LTK)
    present_LT = None if seen[0].present_T is None else _stack([x.present_T for x in seen])
    chosen_LTK = None if seen[0].chosen_TK is None else _stack([x.chosen_TK for x in seen])
    here_LTK = chosen_LTK  # slots that hold a choice of a token that the layer saw; None: all
    if present_LT is not None:
        here_LTK = _and(present_LT.unsqueeze(-1).expand(raw_LTK.shape), chosen_LTK)
    if here_LTK is not None:
        raw_LTK = torch.where(here_LTK, raw_LTK, 0)
        weights_LTK = torch.where(here_LTK, weights_LTK, 0.0)
    ids_LTK = _in_range(raw_LTK, experts, "expert ids out of range", problems)
    tally = _Tally(batch, experts, len(seen))

    counts = {}
    ran_LTK = _and(kept_LTK, here_LTK)
    processed = tally.choices(ids_LTK, ran_LTK)
    counts["processed_GE"] = tally.valid(processed)
    counts["weight_sum_GE"] = tally.valid(tally.choices(ids_LTK, ran_LTK, weights_LTK))
    if distinct_router_ids(seen[0]):
        own_LTK = _stack([x.router_ids_TK for x in seen])
        if here_LTK is not None:
            own_LTK = torch.where(here_LTK, own_LTK, 0)
        own_LTK = _in_range(own_LTK, experts, "router ids out of range", problems)
        routed = tally.choices(own_LTK, here_LTK)
    else:  # one and the same tensor left the router and entered the experts
        own_LTK = ids_LTK
        routed = processed if kept_LTK is None else tally.choices(ids_LTK, here_LTK)
    counts["routed_GE"] = tally.valid(routed)
    if batch.padded:
        counts["padding_GE"] = tally.padding(routed)
    if present_LT is not None:
        tokens = tally.tokens(present_LT.long())
        counts["tokens_G"] = tally.valid(tokens)
        counts["all_tokens"] = tokens.sum(-1)
    if kept_LTK is not None:
        lost_LTK = _and(~kept_LTK, here_LTK)
        counts["overflowed_GE"] = tally.valid(tally.choices(own_LTK, lost_LTK))
        counts["dropped_GE"] = tally.valid(tally.choices(ids_LTK, lost_LTK))
    if ran_LTK is not None:
        unserved_LT = _and(~ran_LTK.any(-1), present_LT)
        counts["unserved_G"] = tally.valid(tally.tokens(unserved_LT.long()))
    if seen[0].choices is not None:
        counts["choices"] = _numbers([x.choices or 0 for x in seen], raw_LTK)

    rows: Numbers = {}
    if batch.rows_N is not None:
        at = batch.rows_N
        rows = {"expert_ids_NK": raw_LTK[:, at].int(), "weights_NK": weights_LTK[:, at].float()}
        if kept_LTK is not None:
            rows["dropped_NK"] = lost_LTK[:, at]
        if chosen_LTK is not None:
            rows["chosen_NK"] = chosen_LTK[:, at]
        if not faithful:
            rows["router_ids_NK"] = own_LTK[:, at].int()
        if present_LT is not None:
            rows["present_N"] = present_LT[:, at]
    if seen[0].logits_TE is not None and meanings[0] is not None:
        z_LTE = _stack([x.logits_TE for x in seen]).float()
        bias_L1E = _biases(seen, meanings)
        _confidence(counts, rows, z_LTE, bias_L1E, ids_LTK, meanings[0], batch, tally)
        if rows and logits:
            rows["logits_NE"] = z_LTE[:, batch.rows_N]
        if present_LT is not None:  # tokens it never saw are not tokens without finite logits
            _forget_absent(counts, tally, present_LT)
    return Reduced(counts, rows, problems, notes)


def _forget_absent(counts: Numbers, tally: _Tally, present_LT: Tensor) -> None:
    absent = tally.valid(tally.tokens((~present_LT).long()))
    if "nonfinite_G" in counts:
        counts["nonfinite_G"] = counts["nonfinite_G"] - absent


def distinct_router_ids(seen: Observed) -> bool:
    """The router stated its choices in a tensor of its own."""
    return seen.router_ids_TK is not None and seen.router_ids_TK is not seen.expert_ids_TK


def _stack(parts: Sequence[Tensor | None]) -> Tensor:
    tensors = [p.detach() for p in parts if p is not None]
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _and(a: Tensor | None, b: Tensor | None) -> Any:
    """Both masks; None is a mask that is set everywhere."""
    return a if b is None else b if a is None else a & b


def _each(found: Sequence[dict[str, int | Tensor]], like: Tensor) -> Numbers:
    """What was found in each layer, by what it is: `[L]` each."""
    names = sorted({name for x in found for name in x})
    return {n: _numbers([x.get(n, 0) for x in found], like) for n in names}


def _numbers(values: Sequence[int | Tensor], like: Tensor) -> Tensor:
    if not any(isinstance(v, Tensor) for v in values):
        return torch.tensor(values)  # on the host, where it is read
    # full_like instead of a copy from the host, for which a device would be waited for
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    return torch.stack([v.long() if isinstance(v, Tensor) else zero + v for v in values])


def _biases(seen: Sequence[Observed], meanings: Sequence[Semantics | None]) -> Tensor | None:
    """Selection biases of the layers, `[L, 1, E]`: the router's buffer, or what it was handed."""
    pairs = zip(seen, meanings, strict=True)
    found = [m.bias if m is not None and m.bias is not None else x.bias_E for x, m in pairs]
    return None if found[0] is None else _stack(found).float().unsqueeze(1)


class _Tally:
    """Sums over tokens by layer, (valid or padding, tag) and expert."""

    def __init__(self, batch: Batch, experts: int, layers: int) -> None:
        self.batch = batch
        self.experts = experts
        self.layers = layers
        self.groups = len(batch.tags) * (2 if batch.padded else 1)

    def choices(
        self, ids_LTK: Tensor, mask_LTK: Tensor | None = None, weights_LTK: Tensor | None = None
    ) -> Tensor:
        """`[L, groups, E]`: choices, or their weights, where the mask is set."""
        index = ids_LTK
        if self.batch.group_T is not None:
            index = index + (self.batch.group_T * self.experts).unsqueeze(-1)
        values = None
        if weights_LTK is not None:
            values = weights_LTK.float() if mask_LTK is None else weights_LTK.float() * mask_LTK
        elif mask_LTK is not None:
            values = mask_LTK.double()
        flat = _sums(index, values, self.groups * self.experts)
        if weights_LTK is None:
            flat = flat.long()
        return flat.view(self.layers, self.groups, self.experts)

    def tokens(self, values_LT: Tensor) -> Tensor:
        """`[L, groups]` or `[L, groups, ...]`: the sum of a value over the tokens of each group."""
        if self.batch.group_T is None:
            return values_LT.sum(1, keepdim=True)
        out = values_LT.new_zeros((self.layers, self.groups, *values_LT.shape[2:]))
        return out.index_add_(1, self.batch.group_T, values_LT)

    def weighted(self, values_LTE: Tensor, scale_LT: Tensor) -> Tensor:
        """`[L, groups, E]`: the sum over the tokens of each group of a row times its scale."""
        if self.batch.group_T is None:
            return torch.bmm(scale_LT.unsqueeze(1), values_LTE)
        return self.tokens(values_LTE * scale_LT.unsqueeze(-1))

    def valid(self, x: Tensor) -> Tensor:
        return x[:, : len(self.batch.tags)]

    def padding(self, x: Tensor) -> Tensor:
        return x[:, len(self.batch.tags) :]


def _in_range(ids_LTK: Tensor, experts: int, text: str, problems: Numbers) -> Tensor:
    """Ids clamped into range; how many were not is a problem of this name."""
    if ids_LTK.device.type == "cpu" and ids_LTK.numel():
        low, high = ids_LTK.aminmax()  # on a CPU, looking costs less than clamping
        if low >= 0 and high < experts:
            return ids_LTK
    problems[text] = ((ids_LTK < 0) | (ids_LTK >= experts)).sum((1, 2))
    return ids_LTK.clamp(0, experts - 1)


def _sums(index_LTK: Tensor, values_LTK: Tensor | None, cells: int) -> Tensor:
    """`[L, cells]`: how often each index stands in a layer, or the sum of its values."""
    if index_LTK.device.type == "cpu":
        # Layer by layer: one pass over all of them would first have to tell their indices apart.
        indices = index_LTK.numpy().reshape(len(index_LTK), -1)
        if values_LTK is None:
            return torch.from_numpy(np.stack([np.bincount(i, minlength=cells) for i in indices]))
        pairs = zip(indices, values_LTK.numpy().reshape(len(index_LTK), -1), strict=True)
        return torch.from_numpy(np.stack([np.bincount(i, v, minlength=cells) for i, v in pairs]))
    # bincount reads the largest index on the host, which would make the model wait
    layers = len(index_LTK)
    first_L = torch.arange(layers, device=index_LTK.device) * cells
    flat = (index_LTK + first_L[:, None, None]).flatten()
    ones = torch.ones_like(flat) if values_LTK is None else values_LTK.flatten()
    return ones.new_zeros(layers * cells).index_add_(0, flat, ones).view(layers, cells)


def _confidence(
    counts: Numbers,
    rows: Numbers,
    z_LTE: Tensor,
    bias_L1E: Tensor | None,
    ids_LTK: Tensor,
    meaning: Semantics,
    batch: Batch,
    tally: _Tally,
) -> None:
    """Entropy, margin, top-1 probability and z-loss: sums by tag, and rows.

    Written for few passes over `[L, T, E]` and few arrays of that size, most of them reused in
    place: this is the larger part of what capture costs.
    """
    top_LT = z_LTE.amax(-1)
    # -inf is a legal logit (an expert masked out): its probability is 0, and 0 x -inf must be too.
    below_LTE = (z_LTE - top_LT.unsqueeze(-1)).clamp_min_(_MASKED)
    exp_LTE = below_LTE.exp()
    total_LT = exp_LTE.sum(-1)
    log_total_LT = total_LT.log()
    zloss_LT = (top_LT + log_total_LT).square_()
    finite_LT = zloss_LT < math.inf  # False for NaN; a third of what isfinite costs
    # On a CPU it costs nothing to look, and saves blanking what is not there.
    whole = z_LTE.device.type == "cpu" and bool(finite_LT.all())
    per_token = {"zloss": zloss_LT}
    if meaning.score == "sigmoid":
        p_LTE = z_LTE.sigmoid()
        scale_LT = p_LTE.sum(-1).reciprocal_()
        mean_log_LT = torch.xlogy(p_LTE, p_LTE).sum(-1) * scale_LT
        per_token["entropy"] = -mean_log_LT - scale_LT.log()
        per_token["top1_prob"] = p_LTE.amax(-1) * scale_LT
    else:
        p_LTE, scale_LT = exp_LTE, total_LT.reciprocal()  # probabilities but for their scale
    if meaning.score is not None:
        # 0 x NaN is NaN: tokens without finite logits must be blanked, not scaled, to zero.
        clean_LTE = p_LTE if whole else torch.where(finite_LT.unsqueeze(-1), p_LTE, 0.0)
        clean_LT = scale_LT if whole else torch.where(finite_LT, scale_LT, 0.0)
        counts["prob_sum_GE"] = tally.valid(tally.weighted(clean_LTE, clean_LT))
    if meaning.score == "softmax":
        mean_LT = exp_LTE.mul_(below_LTE).sum(-1) * scale_LT
        per_token["entropy"] = log_total_LT - mean_LT
        per_token["top1_prob"] = scale_LT
    others_LTE = None
    if meaning.rank is not None:
        # A score that is the logits may stand on logits less their largest: differences are kept.
        score_LTE = meaning.rank(below_LTE if meaning.selection == "logits" else z_LTE, bias_L1E)
        wide_LTK = ids_LTK.long()
        chosen_LT = score_LTE.gather(-1, wide_LTK).amin(-1)
        others_LTE = score_LTE.scatter_(-1, wide_LTK, -math.inf)
        best_LT = others_LTE.amax(-1)
        # Below zero the choice was not by this score (rounding apart), and a masked expert is no
        # runner-up: then there is no margin, and the NaN makes the sum null, since a sum of some
        # of the tokens would mislead.
        margin_LT = chosen_LT - best_LT
        explained_LT = (margin_LT > -1e-5) & (best_LT > _MASKED)
        per_token["margin"] = torch.where(explained_LT, margin_LT.clamp_min_(0.0), math.nan)
    values_LTM = torch.stack(list(per_token.values()), -1)
    if not whole:
        values_LTM = torch.where(finite_LT.unsqueeze(-1), values_LTM, 0.0)
        counts["nonfinite_G"] = tally.valid(tally.tokens((~finite_LT).long()))
    sums = tally.valid(tally.tokens(values_LTM.double()))
    counts |= {f"{name}_sum_G": sums[..., i] for i, name in enumerate(per_token)}
    if not rows:
        return
    at = batch.rows_N
    if "entropy" in per_token:
        rows["entropy_N"] = torch.where(finite_LT, per_token["entropy"], math.nan)[:, at]
    if others_LTE is not None:
        margin_LN = torch.where(finite_LT, per_token["margin"], math.nan)[:, at]
        rows["margin_N"] = margin_LN
        known_LN1 = margin_LN.isfinite().unsqueeze(-1)
        next_LN1 = others_LTE[:, at].argmax(-1, keepdim=True)
        rows["next_ids_NM"] = torch.where(known_LN1, next_LN1, -1).int()
        if meaning.proportional:
            z_LNE = z_LTE[:, at]
            log_share_LN1 = _log(z_LNE.gather(-1, next_LN1), meaning.score)
            log_share_LN1 -= _log(z_LNE.gather(-1, ids_LTK[:, at, :1].long()), meaning.score)
            weight_LN1 = rows["weights_NK"][..., :1] * log_share_LN1.exp_()
            rows["next_weights_NM"] = torch.where(known_LN1, weight_LN1, math.nan)


def _log(z: Tensor, score: str | None) -> Tensor:
    """Logarithm of a probability but for a constant of the token."""
    return torch.nn.functional.logsigmoid(z) if score == "sigmoid" else z.clone()
