"""From what one MoE block was seen to do, the numbers that are kept.

On the block's own device, without waiting for it.

Everything here is a tensor; nothing is read on the host. Values out of range are counted and
clamped, never trusted.

Legend: T tokens, K choices per token, E experts, G tags, N sampled rows. Tokens are counted in
2 G groups: those of valid tokens by tag, then those of padding by tag.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.semantics import Semantics

Numbers = dict[str, Tensor]

_MASKED = -1e4
"""Logits this far below a token's largest are those of masked experts."""


def reduce(
    seen: Observed, batch: Batch, meaning: Semantics | None, experts: int, *, logits: bool
) -> tuple[Numbers, Numbers, Numbers]:
    """Counts, per-token rows and problems of one block in one forward.

    Args:
        seen: Ids and weights are there and have shape `[T, K]`.
        batch: Tags, padding and sampled rows of the same T tokens.
        meaning: How the router works; None where its logits were not seen.
        experts: E, zero experts included.
        logits: Keep the logits of sampled rows.

    Returns:
        Tensors by the names of `LayerCounts`, of `LayerRows`, and of problems.
    """
    assert seen.expert_ids_TK is not None
    assert seen.weights_TK is not None
    raw_TK, weights_TK = seen.expert_ids_TK.detach(), seen.weights_TK.detach()
    problems = {k: torch.as_tensor(v) for k, v in seen.problems.items()}
    ids_TK = _in_range(raw_TK, experts, "expert ids out of range", problems)
    tally = _Tally(batch, experts)
    kept_TK = None if seen.kept_TK is None else seen.kept_TK.detach()

    counts = {"tokens_G": batch.tokens_G}
    processed = tally.choices(ids_TK, kept_TK)
    counts["processed_GE"] = tally.valid(processed)
    counts["weight_sum_GE"] = tally.valid(tally.choices(ids_TK, kept_TK, weights_TK))
    own_TK = seen.router_ids_TK
    if own_TK is None or (own_TK is seen.expert_ids_TK and kept_TK is None):
        # One and the same tensor object left the router and entered the experts.
        own_TK, routed = ids_TK, processed if kept_TK is None else tally.choices(ids_TK)
    else:
        own_TK = _in_range(own_TK.detach(), experts, "router ids out of range", problems)
        routed = tally.choices(own_TK)
    counts["routed_GE"] = tally.valid(routed)
    if batch.padded:
        counts["padding_GE"] = tally.padding(routed)
    if kept_TK is not None:
        counts["overflowed_GE"] = tally.valid(tally.choices(own_TK, ~kept_TK))
        counts["dropped_GE"] = tally.valid(tally.choices(ids_TK, ~kept_TK))
        counts["unserved_G"] = tally.valid(tally.tokens((~kept_TK.any(-1)).long()))

    rows: Numbers = {}
    if batch.rows_N is not None:
        at = batch.rows_N
        rows = {"expert_ids_NK": raw_TK[at].int(), "weights_NK": weights_TK[at].float()}
        if kept_TK is not None:
            rows["dropped_NK"] = ~kept_TK[at]
    if seen.logits_TE is not None and meaning is not None:
        z_TE = seen.logits_TE.detach().float()
        _confidence(counts, rows, z_TE, seen, ids_TK, meaning, batch, tally)
        if rows and logits:
            rows["logits_NE"] = z_TE[batch.rows_N]
    return counts, rows, problems


class _Tally:
    """Sums over tokens by (valid or padding, tag) and expert."""

    def __init__(self, batch: Batch, experts: int) -> None:
        self.batch = batch
        self.experts = experts
        self.groups = len(batch.tags) * (2 if batch.padded else 1)

    def choices(
        self, ids_TK: Tensor, mask_TK: Tensor | None = None, weights_TK: Tensor | None = None
    ) -> Tensor:
        """`[groups, E]`: choices, or their weights, where the mask is set."""
        index = ids_TK.int()  # half the bytes: counting 32-bit ids is a third quicker
        if self.batch.group_T is not None:
            index = index + self.batch.group_T.unsqueeze(-1) * self.experts
        if weights_TK is not None:
            values = weights_TK.float() if mask_TK is None else weights_TK.float() * mask_TK
            flat = _sum_at(index, values, self.groups * self.experts)
        elif mask_TK is None:
            flat = _count_at(index, self.groups * self.experts)
        else:
            flat = _sum_at(index, mask_TK.double(), self.groups * self.experts).long()
        return flat.view(self.groups, self.experts)

    def tokens(self, values_T: Tensor) -> Tensor:
        """`[groups]` or `[groups, ...]`: the sum of a value over the tokens of each group."""
        if self.batch.group_T is None:
            return values_T.sum(0, keepdim=True)
        out = values_T.new_zeros((self.groups, *values_T.shape[1:]))
        return out.index_add_(0, self.batch.group_T, values_T)

    def weighted(self, values_TE: Tensor, scale_T: Tensor) -> Tensor:
        """`[groups, E]`: the sum over the tokens of each group of a row times its scale."""
        if self.batch.group_T is None:
            return (scale_T @ values_TE).unsqueeze(0)
        return self.tokens(values_TE * scale_T.unsqueeze(-1))

    def valid(self, x: Tensor) -> Tensor:
        return x[: len(self.batch.tags)]

    def padding(self, x: Tensor) -> Tensor:
        return x[len(self.batch.tags) :]


def _in_range(ids_TK: Tensor, experts: int, text: str, problems: Numbers) -> Tensor:
    """Ids clamped into range; how many were not is a problem of this name."""
    if ids_TK.device.type == "cpu" and len(ids_TK):
        low, high = ids_TK.aminmax()  # on a CPU, looking costs less than clamping
        if low >= 0 and high < experts:
            return ids_TK
    problems[text] = ((ids_TK < 0) | (ids_TK >= experts)).sum()
    return ids_TK.clamp(0, experts - 1)


def _count_at(index: Tensor, size: int) -> Tensor:
    if index.device.type == "cpu":
        return torch.bincount(index.flatten(), minlength=size)
    # bincount reads the largest index on the host, which would make the model wait
    ones = torch.ones_like(index, dtype=torch.int64).flatten()
    return ones.new_zeros(size).index_add_(0, index.flatten(), ones)


def _sum_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    if index.device.type == "cpu":
        return torch.bincount(index.flatten(), values.flatten(), minlength=size)
    return values.new_zeros(size).index_add_(0, index.flatten(), values.flatten())


def _confidence(
    counts: Numbers,
    rows: Numbers,
    z_TE: Tensor,
    seen: Observed,
    ids_TK: Tensor,
    meaning: Semantics,
    batch: Batch,
    tally: _Tally,
) -> None:
    """Entropy, margin, top-1 probability and z-loss: sums by tag, and rows.

    Written for few passes over `[T, E]` and few arrays of that size, most of them reused in place:
    this is the larger part of what capture costs.
    """
    top_T = z_TE.amax(-1)
    # -inf is a legal logit (an expert masked out): its probability is 0, and 0 x -inf must be too.
    below_TE = (z_TE - top_T.unsqueeze(-1)).clamp_min_(_MASKED)
    exp_TE = below_TE.exp()
    total_T = exp_TE.sum(-1)
    log_total_T = total_T.log()
    zloss_T = (top_T + log_total_T).square_()
    finite_T = zloss_T < math.inf  # False for NaN; a third of what isfinite costs
    # On a CPU it costs nothing to look, and saves blanking what is not there.
    whole = z_TE.device.type == "cpu" and bool(finite_T.all())
    per_token = {"zloss": zloss_T}
    if meaning.score == "sigmoid":
        p_TE = z_TE.sigmoid()
        scale_T = p_TE.sum(-1).reciprocal_()
        mean_log_T = torch.xlogy(p_TE, p_TE).sum(-1) * scale_T
        per_token["entropy"] = -mean_log_T - scale_T.log()
        per_token["top1_prob"] = p_TE.amax(-1) * scale_T
    else:
        p_TE, scale_T = exp_TE, total_T.reciprocal()  # probabilities but for their scale
    if meaning.score is not None:
        # 0 x NaN is NaN: tokens without finite logits must be blanked, not scaled, to zero.
        clean_TE = p_TE if whole else torch.where(finite_T.unsqueeze(-1), p_TE, 0.0)
        clean_T = scale_T if whole else torch.where(finite_T, scale_T, 0.0)
        counts["prob_sum_GE"] = tally.valid(tally.weighted(clean_TE, clean_T))
    if meaning.score == "softmax":
        per_token["entropy"] = log_total_T - exp_TE.mul_(below_TE).sum(-1) * scale_T
        per_token["top1_prob"] = scale_T
    others_TE = None
    if meaning.rank is not None:
        bias = seen.bias_E if meaning.bias is None else meaning.bias
        # A score that is the logits may stand on logits less their largest: differences are kept.
        logits_TE = below_TE if meaning.selection == "logits" else z_TE
        score_TE = meaning.rank(logits_TE, None if bias is None else bias.detach().float())
        wide_TK = ids_TK.long()
        chosen_T = score_TE.gather(1, wide_TK).amin(-1)
        others_TE = score_TE.scatter_(1, wide_TK, -math.inf)
        best_T = others_TE.amax(-1)
        # Below zero the choice was not by this score (rounding apart), and a masked expert is no
        # runner-up: then there is no margin, and the NaN makes the sum null, since a sum of some
        # of the tokens would mislead.
        margin_T = chosen_T - best_T
        explained_T = (margin_T > -1e-5) & (best_T > _MASKED)
        per_token["margin"] = torch.where(explained_T, margin_T.clamp_min_(0.0), math.nan)
    values_TM = torch.stack(list(per_token.values()), -1)
    if not whole:
        values_TM = torch.where(finite_T.unsqueeze(-1), values_TM, 0.0)
    sums = tally.valid(tally.tokens(values_TM.double()))
    counts |= {f"{name}_sum_G": sums[:, i] for i, name in enumerate(per_token)}
    if not whole:
        counts["nonfinite_G"] = tally.valid(tally.tokens((~finite_T).long()))
    if not rows:
        return
    at = batch.rows_N
    if "entropy" in per_token:
        rows["entropy_N"] = torch.where(finite_T, per_token["entropy"], math.nan)[at]
    if others_TE is not None:
        margin_N = torch.where(finite_T, per_token["margin"], math.nan)[at]
        rows["margin_N"] = margin_N
        known_N1 = margin_N.isfinite().unsqueeze(-1)
        next_N1 = others_TE[at].argmax(-1, keepdim=True)
        rows["next_ids_NM"] = torch.where(known_N1, next_N1, -1).int()
        if meaning.proportional:
            z_NE = z_TE[at]
            log_share_N1 = _log(z_NE.gather(1, next_N1), meaning.score)
            log_share_N1 -= _log(z_NE.gather(1, ids_TK[at, :1].long()), meaning.score)
            weight_N1 = rows["weights_NK"][:, :1] * log_share_N1.exp_()
            rows["next_weights_NM"] = torch.where(known_N1, weight_N1, math.nan)


def _log(z: Tensor, score: str | None) -> Tensor:
    """Logarithm of a probability but for a constant of the token."""
    return torch.nn.functional.logsigmoid(z) if score == "sigmoid" else z.clone()
