"""What can be done to a layer's routing: to its router's choice, or to what its experts are given.

An edit that makes a choice is handed what the router chose by, when it chooses: the scores of all
experts, after bias and group limits. The gate weights of the experts that it names are then the
router's own, by its own arithmetic.

Legend: T tokens, K choices per token, E experts, B sequences, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from moe_lens.errors import SteeringError
from moe_lens_hooks.steering.choice import OWN

_SAME_SUM = 1e-2
"""Relative spread of a token's summed weights below which the router makes them sum to one number:
above the rounding of bfloat16."""


@dataclass(frozen=True)
class Choosing:
    """An edit of the router's choice at a layer (its number in call order)."""

    layer: int

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        """The ids `[T, K']` in place of the router's own.

        Args:
            scores_TE: What the router ranks experts by.
            allowed_TE: bool; not masked out (group limits).
            own_TK: The router's choice.

        Raises:
            SteeringError: It leaves too few experts.
        """
        raise NotImplementedError

    def at(self, rows: Tensor) -> Self:
        """The edit for these sequences of the batch alone."""
        return self


@dataclass(frozen=True)
class Giving:
    """An edit of what the experts of a layer are given."""

    layer: int

    def give(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and gate weights in place of the router's."""
        raise NotImplementedError


@dataclass(frozen=True)
class KnockOut(Choosing):
    """These experts cannot be chosen: the router takes its best K of the others.

    Where it limits a token to some groups of experts, these stay the groups that it chose.
    """

    experts: tuple[int, ...]

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        out_E = torch.zeros(scores_TE.shape[1], dtype=torch.bool, device=scores_TE.device)
        out_E[list(self.experts)] = True
        hit_T = out_E[own_TK].any(-1)
        new_TK = own_TK.clone()  # other tokens keep the order of their experts, and so their bits
        new_TK[hit_T] = best(scores_TE[hit_T], (allowed_TE & ~out_E)[hit_T], own_TK.shape[1])
        return new_TK


@dataclass(frozen=True)
class Drop(Giving):
    """These experts compute nothing for the tokens that chose them, and nothing takes their place.

    Where the router makes a token's weights sum to one number, those that are left are scaled up to
    that sum, as it would have scaled them; else they stay as they are.
    """

    experts: tuple[int, ...]

    def give(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        if len(ids_TK) < 2:
            raise SteeringError(
                f"layer {self.layer}: one token alone does not show whether its router normalises "
                "its weights. Measure on more tokens."
            )
        hit_TK = torch.isin(ids_TK, ids_TK.new_tensor(self.experts))
        exact = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
        left_TK = exact.masked_fill(hit_TK, 0)
        sum_T1, kept_T1 = (w.sum(-1, keepdim=True) for w in (exact, left_TK))
        low, high = torch.aminmax(sum_T1[sum_T1 != 0] if bool((sum_T1 != 0).any()) else sum_T1)
        if bool(high - low <= _SAME_SUM * high.abs()):
            some_T1 = hit_TK.any(-1, keepdim=True) & (kept_T1 != 0)  # the others keep their bits
            left_TK = torch.where(some_T1, left_TK * (sum_T1 / kept_T1), left_TK)
        return ids_TK, left_TK.to(weights_TK.dtype)


@dataclass(frozen=True)
class RunnerUp(Choosing):
    """The last of the K experts that a token's router chose gives way to the best other one."""

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        chosen_TE = torch.zeros_like(allowed_TE).scatter_(1, own_TK, True)
        next_T1 = best(scores_TE, allowed_TE & ~chosen_TE, 1)
        return own_TK.scatter(1, _last(scores_TE, own_TK), next_T1)


@dataclass(frozen=True)
class ForceIn(Choosing):
    """Every token that did not choose this expert takes it in place of its last one."""

    expert: int

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        has_T = (own_TK == self.expert).any(-1, keepdim=True)
        last_T1 = _last(scores_TE, own_TK)
        keep_T1 = own_TK.gather(1, last_T1)
        return own_TK.scatter(1, last_T1, torch.where(has_T, keep_T1, self.expert))


@dataclass(frozen=True)
class TopK(Choosing):
    """The router takes another number of experts."""

    k: int

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        if self.k == own_TK.shape[1]:
            return own_TK
        return best(scores_TE, allowed_TE, self.k)


@dataclass(frozen=True)
class Force(Choosing):
    """These experts and no others; rows of -1 keep the router's choice."""

    ids_BSK: Tensor = field(repr=False)

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        ids_TK = self.ids_BSK.reshape(-1, self.ids_BSK.shape[-1]).to(own_TK)
        if ids_TK.shape != own_TK.shape:
            raise SteeringError(
                f"layer {self.layer}: ids for {len(ids_TK)} tokens x {ids_TK.shape[1]} experts, "
                f"but the router chose for {len(own_TK)} x {own_TK.shape[1]}."
            )
        return torch.where(ids_TK == OWN, own_TK, ids_TK)

    def at(self, rows: Tensor) -> Self:
        return replace(self, ids_BSK=self.ids_BSK[rows])


@dataclass(frozen=True)
class Random(Choosing):
    """As many experts, drawn alike; never the set that the router chose."""

    seed: int

    def choose(self, scores_TE: Tensor, allowed_TE: Tensor, own_TK: Tensor) -> Tensor:
        E, K = scores_TE.shape[1], own_TK.shape[1]
        if K >= E:
            raise SteeringError(f"layer {self.layer} chooses all {E} experts: there are no others.")
        draw = torch.Generator().manual_seed(self.seed)
        own_TK = own_TK.sort(-1).values.cpu()
        new_TK = own_TK.clone()
        while (same_T := (new_TK.sort(-1).values == own_TK).all(-1)).any():
            drawn = torch.rand(int(same_T.sum()), E, generator=draw).argsort(-1)[:, :K]
            new_TK[same_T] = drawn
        return new_TK.to(scores_TE.device)

    def at(self, rows: Tensor) -> Self:
        return replace(self, seed=hash((self.seed, int(rows[0]))) & 0x7FFFFFFF)


@dataclass(frozen=True)
class Duplicate(Giving):
    """`over` becomes a copy of `expert`: what chose it keeps its weight, and runs `expert`."""

    expert: int
    over: int

    def give(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return ids_TK.masked_fill(ids_TK == self.over, self.expert), weights_TK


Edit = Choosing | Giving


def best(scores_TE: Tensor, allowed_TE: Tensor, k: int) -> Tensor:
    """The k best of those that may be chosen, the best first.

    Raises:
        SteeringError: A token has fewer.
    """
    fewest = int(allowed_TE.sum(-1).min()) if len(allowed_TE) else k
    if fewest < k:
        raise SteeringError(
            f"a token is left with {fewest} experts that its router could choose, and needs {k}: "
            "knock out fewer, or choose a smaller top-k."
        )
    return scores_TE.masked_fill(~allowed_TE, -torch.inf).topk(k, dim=-1).indices


def _last(scores_TE: Tensor, own_TK: Tensor) -> Tensor:
    """Slot `[T, 1]` of the worst expert that was chosen; routers need not return them in order."""
    scores_TK = scores_TE.gather(1, own_TK)
    K = own_TK.shape[1]  # of equal ones the last
    return K - 1 - scores_TK.flip(-1).argmin(-1, keepdim=True)
