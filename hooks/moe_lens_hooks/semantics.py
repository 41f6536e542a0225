"""What a router's logits mean: learned from numbers on a layer's first forward, never assumed.

Two questions. How do logits become probabilities (softmax or sigmoid)? The gate weights of a token
are proportional to one or the other. What does the router rank experts by? By the score for which
the chosen experts really are the k best. Where no candidate fits, entropy, margin and runners-up
are null rather than wrong.

Legend: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lens_hooks.adapter import Observed, first_int

Score = Callable[[Tensor, Tensor | None], Tensor]
"""(logits `[…, E]`, bias that broadcasts to them) to the selection score, of the same shape; -inf
where an expert may not be chosen."""


@dataclass
class Semantics:
    """How one layer's router works, as far as its numbers show.

    Attributes:
        score: "softmax", "sigmoid" or None.
        selection: Name of what experts are ranked by, None when nothing tried explains the choices.
        rank: Computes it.
        normalised: The weights of a token sum to one.
        proportional: The weights of a token are proportional to the probabilities of its experts,
            so that the weight of a runner-up is known too.
    """

    score: str | None
    selection: str | None
    rank: Score | None
    normalised: bool
    proportional: bool
    bias: Tensor | None = None
    """The router's own bias buffer, read anew at every forward."""


def probabilities(logits_TE: Tensor, score: str) -> Tensor:
    """The router's full distribution: softmax, or sigmoids divided by their sum."""
    if score == "softmax":
        return logits_TE.softmax(-1)
    s = logits_TE.sigmoid()
    return s / s.sum(-1, keepdim=True)


def learn(seen: Observed, router: nn.Module | None, experts: int) -> Semantics | None:
    """What the first forward of a layer tells of its router; None without logits."""
    ids, weights, logits = seen.expert_ids_TK, seen.weights_TK, seen.logits_TE
    if ids is None or weights is None or logits is None or len(ids) == 0:
        return None
    usable = torch.isfinite(logits).all(-1) & ((ids >= 0) & (ids < logits.shape[-1])).all(-1)
    if not bool(usable.any()):
        return None
    chosen_from = seen.router_ids_TK if seen.router_ids_TK is not None else ids
    ids, chosen = ids[usable].long(), chosen_from[usable].long()
    z, w = logits[usable].float(), weights[usable].float()
    # What the weights were rounded to decides how closely they can be proportional.
    tolerance = 0.04 if weights.dtype.itemsize < 4 or logits.dtype.itemsize < 4 else 1e-3
    hint = _hint(router)
    order = ("sigmoid", "softmax") if hint == "sigmoid" else ("softmax", "sigmoid")
    fits = [s for s in order if _proportional(probabilities(z, s).gather(1, ids), w, tolerance)]
    if ids.shape[1] == 1:  # any weight is proportional to one number: it must be the number
        fits = [s for s in order if _equal(_raw(z, s).gather(1, ids), w, tolerance)]
    bias = _bias(router, experts)
    score = fits[0] if fits else hint
    name, rank = _selection(z, chosen, seen.bias_E if bias is None else bias, router, score)
    return Semantics(
        score=score,
        selection=name,
        rank=rank,
        normalised=bool(torch.allclose(w.sum(-1), torch.ones(len(w), device=w.device), atol=0.02)),
        proportional=bool(fits),
        bias=bias,
    )


def _raw(z: Tensor, score: str) -> Tensor:
    return z.softmax(-1) if score == "softmax" else z.sigmoid()


def _proportional(p_TK: Tensor, w_TK: Tensor, tolerance: float) -> bool:
    ratio = w_TK / p_TK.clamp_min(1e-30)
    spread = (ratio.amax(-1) - ratio.amin(-1)) / ratio.amax(-1).clamp_min(1e-30)
    return bool((spread < tolerance).float().mean() > 0.99)


def _equal(p_TK: Tensor, w_TK: Tensor, tolerance: float) -> bool:
    return bool(((p_TK - w_TK).abs() <= tolerance * w_TK.abs()).float().mean() > 0.99)


def _hint(router: nn.Module | None) -> str | None:
    """What the router's source says, for when the numbers cannot decide (top-1, normalised)."""
    try:
        source = inspect.getsource(type(router)) if router is not None else ""
    except (OSError, TypeError):  # classes made in a notebook or by exec have no source
        return None
    named = [s for s in ("sigmoid", "softmax") if s in source]
    return named[0] if len(named) == 1 else None


def _bias(router: nn.Module | None, experts: int) -> Tensor | None:
    if router is None:
        return None
    tensors = (*router.named_buffers(), *router.named_parameters())
    found = [t for n, t in tensors if t.shape == (experts,) and ("correction" in n or "score" in n)]
    return found[0] if found else None


def _selection(
    z: Tensor, ids: Tensor, bias: Tensor | None, router: nn.Module | None, score: str | None
) -> tuple[str | None, Score | None]:
    """The first candidate for which the chosen experts are the best in every token."""
    groups = first_int(router, "num_group", "n_group", "num_expert_group")
    top_groups = first_int(router, "topk_group", "top_groups")
    for name, rank in _candidates(z.shape[-1], bias is not None, groups, top_groups, score):
        s = rank(z, bias)
        if not bool(torch.isfinite(s.gather(1, ids)).all()):
            continue
        worst_chosen = s.gather(1, ids).amin(-1)
        best_other = s.scatter(1, ids, -math.inf).amax(-1)
        if bool((worst_chosen >= best_other - 1e-6).float().mean() > 0.999):
            return name, rank
    return None, None


def _candidates(
    experts: int, has_bias: bool, groups: int | None, top_groups: int | None, score: str | None
) -> list[tuple[str, Score]]:
    """Selection scores to try, the most structured first.

    Few tokens, or a bias that is still zero, fit the plain ones too, and what fits first is kept
    for the whole run.
    """
    names: dict[str, Score] = {
        "softmax": lambda z, _: z.softmax(-1),
        "sigmoid": lambda z, _: z.sigmoid(),
    }
    order = sorted(names, key=lambda n: n != score)  # what the weights are proportional to, first
    plain: list[tuple[str, Score]] = [(n, names[n]) for n in order]
    biased: list[tuple[str, Score]] = []
    if has_bias:
        biased = [(f"{n}+bias", lambda z, b, f=f: f(z, None) + b) for n, f in plain]  # type: ignore[misc]
    out: list[tuple[str, Score]] = []
    if groups and top_groups and groups > 1 and top_groups < groups and experts % groups == 0:
        tops = ((2, "groups by top-2"), (1, "groups by top-1"))
        for name, f in biased or plain:
            for best, label in tops if has_bias else tops[::-1]:
                out.append((f"{name}, {label}", _grouped(f, groups, top_groups, best)))
    return [*out, *biased, ("logits", lambda z, _: z)]


def _grouped(score: Score, groups: int, top_groups: int, best: int) -> Score:
    """Only experts of the best groups may be chosen (DeepSeek-V2: best 1, DeepSeek-V3: best 2)."""

    def rank(z: Tensor, bias: Tensor | None) -> Tensor:
        s = score(z, bias)
        by_group = s.view(*s.shape[:-1], groups, -1)
        value = by_group.topk(min(best, by_group.shape[-1]), dim=-1).values.sum(-1)
        allowed = torch.zeros_like(value, dtype=torch.bool)
        allowed.scatter_(-1, value.topk(top_groups, dim=-1).indices, True)
        return by_group.masked_fill(~allowed.unsqueeze(-1), -math.inf).view(s.shape)

    return rank
