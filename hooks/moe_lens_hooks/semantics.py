"""What a router's logits mean: learned from numbers on a layer's first forward, never assumed.

Two questions. How do logits become probabilities (a softmax, or a positive score of each divided by
their sum)? The gate weights of a token are proportional to one or the other. What does the router
rank experts by? By the score for which the chosen experts really are the k best. Where no candidate
fits, entropy, margin and runners-up are null rather than wrong.

Legend: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import Observed, first_int

Score = Callable[[Tensor, Tensor | None], Tensor]
"""(logits `[…, E]`, bias that broadcasts to them) to the selection score, of the same shape; -inf
where an expert may not be chosen."""

POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
}
"""Scores of one logit each, by name: divided by their sum they are probabilities."""

_BIAS = re.compile(r"correction|score|balanc|expert_bias", re.IGNORECASE)
"""Names of biases for selection only. A plain `bias` is a part of the logits."""


Groups = tuple[int | None, int | None]
"""Groups of a layer's experts, and how many of them a token may use; None: no such number."""


@dataclass
class Semantics:
    """How one layer's router works, as far as its numbers show.

    Attributes:
        score: "softmax", one of `POSITIVE`, or None.
        selection: Name of what experts are ranked by, None when nothing tried explains the choices.
        rank: Computes it.
        normalised: The weights of a token sum to one.
        proportional: The weights of a token are proportional to the probabilities of its experts,
            so that the weight of a runner-up is known too.
        router: What the bias is looked up in.
        bias_name: Its name there.
        slack: How far, relative to 1 + |score|, a chosen expert may lie below one that was not: a
            router that computes in half precision rounds its scores.
    """

    score: str | None
    selection: str | None
    rank: Score | None
    normalised: bool
    proportional: bool
    router: nn.Module | None = None
    bias_name: str | None = None
    slack: float = 1e-6

    @property
    def bias(self) -> Tensor | None:
        """The router's own selection bias `[E]`, as it is now: training moves it."""
        if self.bias_name is None:
            return None
        bias: Tensor = attrgetter(self.bias_name)(self.router)
        return bias.detach().reshape(-1)


_bias_names: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def selection_bias(router: nn.Module | None, experts: int) -> Tensor | None:
    """The buffer itself that is the router's own selection bias; it is looked for once.

    Not a parameter: no forward moves one, and FSDP takes its memory away when the block is left.
    """
    if router is None:
        return None
    if router not in _bias_names:
        _bias_names[router] = _bias(router, experts)
    name = _bias_names[router]
    try:
        bias = None if name is None else attrgetter(name)(router)
    except AttributeError:  # it was taken off the router
        return None
    return None if isinstance(bias, nn.Parameter) else bias


def correction_bias(module: nn.Module | None, experts: int) -> Tensor | None:
    """The selection bias `[E]` in a router, or around one, buffer or parameter, as it is now."""
    name = _bias(module, experts)
    return None if name is None else attrgetter(name)(module).detach().reshape(-1)


def probabilities(logits_TE: Tensor, score: str) -> Tensor:
    """The router's full distribution."""
    s = _raw(logits_TE, score)
    return s if score == "softmax" else s / s.sum(-1, keepdim=True)


def learn(
    seen: Observed,
    router: nn.Module | None,
    experts: int,
    declared: LayerInfo | None = None,
) -> Semantics | None:
    """What the first forward of a layer tells of its router; None without logits.

    Args:
        seen: Of that forward.
        router: Searched for a selection bias and, where none are declared, for groups.
        experts: E, zero experts included.
        declared: The adapter's word: groups, and the selection that is tried first.
    """
    given, weights, logits = seen.expert_ids_TK, seen.weights_TK, seen.logits_TE
    if given is None or weights is None or logits is None or len(given) == 0:
        return None
    # Weights are those of the experts that were meant, whatever ran.
    ids = given if seen.router_ids_TK is None else seen.router_ids_TK
    usable = _finite(logits) & ((ids >= 0) & (ids < logits.shape[-1])).all(-1)
    if seen.chosen_TK is not None:
        usable = usable & seen.chosen_TK.all(-1)
    if not bool(usable.any()):
        return None
    ids, z, w = ids[usable].long(), logits[usable].float(), weights[usable].float()
    # A weight of zero is that of a choice which was dropped or skipped, not a probability.
    weighed = (w != 0).all(-1)
    # What the weights were rounded to decides how closely they can be proportional.
    tolerance = 0.04 if weights.dtype.itemsize < 4 or logits.dtype.itemsize < 4 else 1e-3
    hint = _hint(router)
    order = sorted(("softmax", *POSITIVE), key=lambda name: name != hint)
    fits = [s for s in order if _fits(z[weighed], ids[weighed], w[weighed], s, tolerance)]
    bias_name = _bias(router, experts)
    score = fits[0] if fits else hint
    out = Semantics(score, None, None, _sums_to_one(w[weighed]), bool(fits), router, bias_name)
    bias = seen.bias_E if out.bias is None else out.bias
    if logits.dtype.itemsize < 4:
        out.slack = torch.finfo(logits.dtype).eps
    groups, first = groups_of(router, experts), None
    if declared is not None:
        first = declared.selection
        groups = (declared.groups, declared.top_groups) if declared.groups else groups
    tried = _candidates(z.shape[-1], bias is not None, groups, score)
    tried.sort(key=lambda candidate: candidate[0] != first)
    out.selection, out.rank = _selection(z, ids, bias, tried, out.slack)
    return out


def _finite(logits_TE: Tensor) -> Tensor:
    """Tokens that can be looked at: a logit of -inf is legal, that of a masked expert."""
    return logits_TE.logsumexp(-1).isfinite()


def _raw(z: Tensor, score: str) -> Tensor:
    return z.softmax(-1) if score == "softmax" else POSITIVE[score](z)


def _fits(z_TE: Tensor, ids_TK: Tensor, w_TK: Tensor, score: str, tolerance: float) -> bool:
    """The weights are proportional to the probabilities that this score gives."""
    if len(w_TK) == 0:
        return False
    if ids_TK.shape[1] == 1:  # any weight is proportional to one number: it must be the number
        p_TK = _raw(z_TE, score).gather(1, ids_TK)
        close = (p_TK - w_TK).abs() <= tolerance * w_TK.abs()
    else:
        p_TK = probabilities(z_TE, score).gather(1, ids_TK)
        ratio = w_TK / p_TK.clamp_min(1e-30)
        close = (ratio.amax(-1) - ratio.amin(-1)) < tolerance * ratio.amax(-1).clamp_min(1e-30)
    return bool(close.float().mean() > 0.99)


def _sums_to_one(w_TK: Tensor) -> bool:
    return len(w_TK) > 0 and bool(((w_TK.sum(-1) - 1).abs() < 0.02).all())


def _hint(router: nn.Module | None) -> str | None:
    """What the router's source says, for when the numbers cannot decide (top-1, normalised)."""
    if router is None:
        return None
    source = _source(type(router)) + " ".join(type(m).__name__.lower() for m in router.children())
    named = [s for s in ("softmax", *POSITIVE) if s in source]
    return named[0] if len(named) == 1 else None


_sources: WeakKeyDictionary[type[nn.Module], str] = WeakKeyDictionary()


def _source(kind: type[nn.Module]) -> str:
    """Source of a router's class, and of functions of its module that its forward names.

    Read once: it takes longer than all else that is asked of a layer.
    """
    if kind not in _sources:
        _sources[kind] = _read_source(kind)
    return _sources[kind]


def _read_source(kind: type[nn.Module]) -> str:
    home = sys.modules.get(kind.__module__)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    named = [getattr(home, n, None) for n in (code.co_names if code is not None else ())]
    own = [f for f in named if inspect.isfunction(f) and f.__module__ == kind.__module__]
    try:
        return "\n".join([inspect.getsource(kind), *map(inspect.getsource, own)])
    except (OSError, TypeError):  # classes made in a notebook or by exec have no source
        return ""


# Of transformers, torchtitan and Megatron.
_GROUPS = ("num_group", "n_group", "num_expert_group", "num_expert_groups", "moe_router_num_groups")
_TOP_GROUPS = ("topk_group", "top_groups", "num_limited_groups", "moe_router_group_topk")


def groups_of(router: nn.Module | None, experts: int) -> Groups:
    """Groups that a router divides its experts into, and how many of them a token may use.

    (None, None) where it chooses from all experts.
    """
    groups = first_int(router, *_GROUPS)
    top_groups = first_int(router, *_TOP_GROUPS)
    unused = getattr(router, "topk_method", None) == "greedy"  # DeepSeek-V2: has them, uses none
    if unused or groups is None or top_groups is None or not 1 <= top_groups < groups:
        return None, None
    if experts % groups:  # a number that this router cannot use
        return None, None
    return groups, top_groups


def _bias(router: nn.Module | None, experts: int) -> str | None:
    """Name of the router's selection bias, `[E]` or `[1, E]`."""
    if router is None:
        return None
    for name, tensor in (*router.named_buffers(), *router.named_parameters()):
        if tensor.shape in ((experts,), (1, experts)) and _BIAS.search(name):
            return name
    return None


def _selection(
    z: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    candidates: list[tuple[str, Score]],
    slack: float,
) -> tuple[str | None, Score | None]:
    """The first candidate for which the chosen experts are the best in every token."""
    for name, rank in candidates:
        s = rank(z, bias)
        worst_chosen = s.gather(1, ids).amin(-1)
        best_other = s.scatter(1, ids, -math.inf).amax(-1)
        room = slack * (1 + worst_chosen.abs())
        explained = worst_chosen.isfinite() & (worst_chosen >= best_other - room)
        if bool(explained.float().mean() > 0.999):
            return name, rank
    return None, None


def _candidates(
    experts: int, has_bias: bool, limit: Groups, score: str | None
) -> list[tuple[str, Score]]:
    """Selection scores to try, the most structured first.

    Few tokens, or a bias that is still zero, fit the plain ones too, and what fits first is kept
    for the whole run.
    """
    groups, top_groups = limit
    names: dict[str, Score] = {
        name: lambda z, _, name=name: _raw(z, name)  # type: ignore[misc]
        for name in ("softmax", *POSITIVE)
    }
    logits: tuple[str, Score] = ("logits", lambda z, _: z)
    order = sorted(names, key=lambda n: n != score)  # what the weights are proportional to, first
    plain: list[tuple[str, Score]] = [(n, names[n]) for n in order]
    biased: list[tuple[str, Score]] = []
    if has_bias:
        biased = [
            (f"{n}+bias", lambda z, b, f=f: f(z, None) + b)  # type: ignore[misc]
            for n, f in (*plain, logits)
        ]
    out: list[tuple[str, Score]] = []
    if groups and top_groups and top_groups < groups and experts % groups == 0:
        tops = [(2, "groups by top-2"), (1, "groups by top-1")]
        if not has_bias:
            tops = [*tops[::-1], (experts // groups, "groups by their sum")]
        for name, f in biased or plain:
            for best, label in tops:
                out.append((f"{name}, {label}", _grouped(f, groups, top_groups, best)))
    return [*out, *biased, logits]


def _grouped(score: Score, groups: int, top_groups: int, best: int) -> Score:
    """Only experts of the best groups may be chosen.

    DeepSeek-V2: by the best one in them, DeepSeek-V3: by the best two; a router of two stages: by
    the sum of all, where the score is a probability.
    """

    def rank(z: Tensor, bias: Tensor | None) -> Tensor:
        s = score(z, bias)
        by_group = s.view(*s.shape[:-1], groups, -1)
        value = by_group.topk(min(best, by_group.shape[-1]), dim=-1).values.sum(-1)
        allowed = torch.zeros_like(value, dtype=torch.bool)
        allowed.scatter_(-1, value.topk(top_groups, dim=-1).indices, True)
        return by_group.masked_fill(~allowed.unsqueeze(-1), -math.inf).view(s.shape)

    return rank
