"""How does the demo route its tokens? Softmax router, top-k, capacity, SwiGLU experts.

Token choice as in Switch and GShard (arXiv 2101.03961, 2006.16668): each token picks its k most
probable experts. In training an expert serves at most C choices of a forward, and what finds it
full is dropped: the token keeps its residual. In evaluation nothing is dropped.

Tensor names carry their shape:

    B batch, S sequence, T tokens (B * S), K top-k, E experts, D hidden, F expert intermediate,
    G gate and up (2 * F), C choices of one expert (at most its capacity), R choices of all experts
    (at most T * K), sorted by expert
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, capacity, experts.

    Attributes:
        num_experts: E.
        top_k: K.
        capacity_factor: Room of an expert in training, in units of its fair share T * K / E.
        capacity: C of the last forward; None when it was dropless.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        capacity_factor: float,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.capacity: int | None = None
        self.router = TopKRouter(hidden_size, num_experts, top_k)
        self.experts = Experts(hidden_size, intermediate_size, num_experts)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route every token and mix what its experts return.

        1. flatten to T tokens; 2. the router picks K experts for each; 3. in training, a choice
        that finds its expert full is dropped; 4. the experts run and are mixed.

        Returns:
            y_BSD, and this layer's two scalars: load-balancing loss and z-loss.
        """
        x_TD = x_BSD.flatten(0, 1)
        logits_TE, weights_TK, expert_ids_TK = self.router(x_TD)
        kept_TK = None
        self.capacity = None
        if self.training:
            fair_share = len(x_TD) * self.top_k / self.num_experts
            self.capacity = math.ceil(self.capacity_factor * fair_share)
            kept_TK = within_capacity(expert_ids_TK, self.num_experts, self.capacity)
        y_TD = self.experts(x_TD, expert_ids_TK, weights_TK, kept_TK)
        aux_loss = load_balancing_loss(logits_TE, expert_ids_TK)
        return y_TD.view_as(x_BSD), aux_loss, router_z_loss(logits_TE)


class TopKRouter(nn.Module):
    """Softmax over all experts; the k largest, renormalised to sum to 1."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits_TE, weights_TK and expert_ids_TK, the most probable expert first."""
        logits_TE = self.gate(x_TD)
        prob_TK, expert_ids_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, prob_TK / prob_TK.sum(dim=-1, keepdim=True), expert_ids_TK


class Experts(nn.Module):
    """E SwiGLU networks, stacked. A token's output is the weighted sum over its kept choices."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.gate_up_EGD = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_EDF = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        kept_TK: Tensor | None = None,
    ) -> Tensor:
        """Compute y_TD; ``kept_TK`` (bool) marks the choices to compute, None for all of them."""
        E = self.num_experts
        if kept_TK is not None:
            # Dropped choices go to a last group, behind those of the experts, which nobody runs.
            expert_ids_TK = expert_ids_TK.masked_fill(~kept_TK, E)
        sizes = expert_ids_TK.flatten().bincount(minlength=E)[:E].tolist()
        # The sort is stable, so the choices of an expert stay in the order of their tokens.
        choices_R = expert_ids_TK.flatten().argsort(stable=True)[: sum(sizes)]
        tokens_R = choices_R // expert_ids_TK.shape[1]
        y_RD = self._swiglu(x_TD.index_select(0, tokens_R), sizes)
        y_RD = y_RD * weights_TK.flatten().index_select(0, choices_R).unsqueeze(-1)
        return torch.zeros_like(x_TD).index_add(0, tokens_R, y_RD)

    def _swiglu(self, x_RD: Tensor, sizes: Sequence[int]) -> Tensor:
        """Run each expert on its slice; ``sizes`` are the lengths of the E slices."""
        outputs = []
        # unbind, since indexing the stack by expert would make its gradient once per expert.
        weights = zip(self.gate_up_EGD.unbind(), self.down_EDF.unbind(), strict=True)
        slices = torch.split_with_sizes(x_RD, sizes)
        for x_CD, (gate_up_GD, down_DF) in zip(slices, weights, strict=True):
            gate_CF, up_CF = F.linear(x_CD, gate_up_GD).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate_CF) * up_CF, down_DF))
        return torch.cat(outputs)


def within_capacity(expert_ids_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which choices find room, kept_TK (bool).

    First choices of all tokens are served before second choices, each by position.
    """
    T, K = expert_ids_TK.shape
    by_rank = expert_ids_TK.t().flatten()
    order = by_rank.argsort(stable=True)
    sizes_E = by_rank.bincount(minlength=num_experts)
    first_E = sizes_E.cumsum(0) - sizes_E
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return (place - first_E[by_rank] < capacity).view(K, T).t()


def load_balancing_loss(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Switch auxiliary loss (arXiv 2101.03961, eq. 4): E * sum_e share_e * mean probability_e.

    It is 1 for a balanced router and E for one that sends everything to one expert. The shares
    are those of the router's choices, before any is dropped.
    """
    num_experts = logits_TE.shape[1]
    share_E = expert_ids_TK.flatten().bincount(minlength=num_experts) / expert_ids_TK.numel()
    return num_experts * (share_E * logits_TE.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()
