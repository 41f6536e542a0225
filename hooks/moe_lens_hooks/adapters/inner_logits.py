"""Gemma 4 and DiffusionGemma: the router returns probabilities; its logits are those of `proj`.

    probs_TE, weights_TK, expert_ids_TK = router(x_TD)       probs = softmax(proj(norm(x) * scale))
    y_TD = experts(x_TD, expert_ids_TK, weights_TK)

A softmax of probabilities is nearly uniform, and so would its entropy be.

Legend: T tokens, K choices per token, E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moe_lens_hooks.adapter import MoELayer, Observed, Tap
from moe_lens_hooks.adapters.fused_experts import FusedExperts


class InnerLogits:
    """A block of `FusedExperts` whose `router` has `proj` and `per_expert_scale`."""

    name = "inner-logits"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        router = getattr(module, "router", None)
        proj = getattr(router, "proj", None)
        if not isinstance(proj, nn.Linear) or not hasattr(router, "per_expert_scale"):
            return None
        layer = FusedExperts().layer(path, module)
        if layer is None or layer.info.experts != proj.out_features:
            return None
        count = layer.info.experts

        def read_proj(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.logits_TE = output.reshape(-1, count)

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.router_ids_TK = output[2]

        assert isinstance(router, nn.Module)
        taps = [
            layer.taps[0],
            Tap(proj, "output", read_proj),
            Tap(router, "output", read_router),
        ]
        return MoELayer(module, replace(layer.info, adapter=self.name), taps, router)
