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

import torch
from torch import Tensor

from moe_lens_hooks.adapter import Observed
from moe_lens_hooks.batch import Batch
from moe_lens_hooks.confidence import Numbers, Routers, confidence
from moe_lens_hooks.semantics import Semantics
from moe_lens_hooks.tally import Tally


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
    groups: int | None = None,
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
        groups: Equal groups that all E experts are divided into; None: none.
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
    tally = Tally(batch, experts)

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
    if seen[0].received_E is not None and len(batch.tags) == 1:  # others' rows carry no tag
        counts["received_GE"] = _stack([x.received_E for x in seen]).long().unsqueeze(1)
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
        routers = _routers(seen, meanings, own_LTK, weights_LTK, chosen_LTK, present_LT)
        routers.groups = groups
        sums, own = confidence(routers, batch, tally, rows=bool(rows), logits=logits)
        counts |= sums
        rows |= own
    return Reduced(counts, rows, problems, notes)


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
        return torch.tensor(values, device="cpu")  # on the host, where it is read
    # full_like instead of a copy from the host, for which a device would be waited for
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    return torch.stack([v.long() if isinstance(v, Tensor) else zero + v for v in values])


def _routers(
    seen: Sequence[Observed],
    meanings: Sequence[Semantics | None],
    ids_LTK: Tensor,
    weights_LTK: Tensor,
    chosen_LTK: Tensor | None,
    present_LT: Tensor | None,
) -> Routers:
    """The routers' side of what was seen, for `confidence`."""
    assert meanings[0] is not None
    if chosen_LTK is not None:  # an empty slot repeats the first choice, which changes no margin
        first_LT1 = chosen_LTK.int().argmax(-1, keepdim=True)
        ids_LTK = torch.where(chosen_LTK, ids_LTK, ids_LTK.gather(-1, first_LT1))
    return Routers(
        logits_TE=[x.logits_TE for x in seen if x.logits_TE is not None],
        bias_E=_biases(seen, meanings),
        ids_LTK=ids_LTK,
        meaning=meanings[0],
        weights_LTK=weights_LTK if chosen_LTK is None else None,
        present_LT=present_LT,
    )


def _biases(seen: Sequence[Observed], meanings: Sequence[Semantics | None]) -> list[Tensor] | None:
    """Selection biases of the layers: the router's buffer, or what it was handed."""
    pairs = zip(seen, meanings, strict=True)
    found = [_bias_then(x, m.bias if m is not None else None) for x, m in pairs]
    return None if found[0] is None else [b for b in found if b is not None]


def _bias_then(seen: Observed, now: Tensor | None) -> Tensor | None:
    """The selection bias of one layer, as it was when the router added it.

    One that was held and has changed since is NaN: it explains no choice, and there is no margin.
    """
    bias = seen.bias_E if now is None else now
    if bias is None or "bias_E" not in seen.held:
        return bias
    tensor, version = seen.held["bias_E"]
    then = tensor.detach().reshape(-1)
    moved = version >= 0 and tensor._version != version
    return torch.full_like(then, math.nan, dtype=torch.float32) if moved else then


def _in_range(ids_LTK: Tensor, experts: int, text: str, problems: Numbers) -> Tensor:
    """Ids clamped into range; how many were not is a problem of this name."""
    if ids_LTK.device.type == "cpu" and ids_LTK.numel():
        low, high = ids_LTK.aminmax()  # on a CPU, looking costs less than clamping
        if low >= 0 and high < experts:
            return ids_LTK
    problems[text] = ((ids_LTK < 0) | (ids_LTK >= experts)).sum((1, 2))
    return ids_LTK.clamp(0, experts - 1)
