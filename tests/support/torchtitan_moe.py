"""A small MoE layer of torchtitan, by the kind of its router."""

from __future__ import annotations

import torch
from torch import nn
from torchtitan.models.common import moe
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

D, E, K = 16, 8, 2

ROUTERS = {
    "softmax": {"score_func": "softmax"},
    "softmax normalised": {"score_func": "softmax", "route_norm": True},
    "sigmoid": {"score_func": "sigmoid"},
    "sigmoid scaled": {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5},
    "groups": {"score_func": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2},
    "forced balance": {"score_func": "softmax", "_debug_force_load_balance": True},
}


def make(
    router="softmax", bias=0.1, shared=False, dispatcher=LocalTokenDispatcher, local_experts=E
):
    """The layer; `local_experts` of its E experts are on this rank."""
    torch.manual_seed(0)
    gate = Linear.Config(in_features=D, out_features=E)
    ffn = {n: Linear.Config(in_features=D, out_features=D) for n in ("w1", "w2", "w3")}
    experts = moe.GroupedExperts.Config(dim=D, hidden_dim=32, num_experts=local_experts)
    config = moe.MoE.Config(
        num_experts=E,
        router=moe.TokenChoiceTopKRouter.Config(
            gate=gate, num_experts=E, top_k=K, **ROUTERS[router]
        ),
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=experts,
            token_dispatcher=dispatcher.Config(num_experts=E, top_k=K),
        ),
        shared_experts=FeedForward.Config(**ffn) if shared else None,
    )
    model = config.build()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.expert_bias_E.copy_(torch.randn(E) * bias)
    return model
