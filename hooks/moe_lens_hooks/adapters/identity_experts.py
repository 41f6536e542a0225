"""LongCat-Flash: some of the experts that a router may choose give their input back.

    logits_TE, weights_TK, expert_ids_TK = router(x)
    y_TD = experts(x_TD, expert_ids_TK, weights_TK)       ids from num_routed_experts on: identity

They compute nothing, but their weight counts: the token itself is added, scaled by it.

Legend: T tokens, K choices per token, E experts (identity experts among them), D hidden.
"""

from __future__ import annotations

from torch import nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Tap, first_int, first_number, stream_of
from moe_lens_hooks.adapters.fused_experts import read_experts, read_router


class IdentityExperts:
    """Block with `router` and `experts`, which has `num_routed_experts` and `zero_expert_num`."""

    name = "identity-experts"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        experts, router = getattr(module, "experts", None), getattr(module, "router", None)
        if not isinstance(experts, nn.Module) or not isinstance(router, nn.Module):
            return None
        routed = first_int(experts, "num_routed_experts")
        zero, total = first_int(experts, "zero_expert_num"), first_int(experts, "total_experts")
        if routed is None or zero is None or total != routed + zero:
            return None
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=routed,
            zero_experts=zero,
            top_k=first_int(router, "top_k"),
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=first_int(experts, "hidden_size"),
            intermediate_size=first_int(experts, "intermediate_size"),
        )
        taps = [
            Tap(experts, "input", read_experts(experts, "top_k_index", "top_k_weights")),
            Tap(router, "output", read_router(total)),
        ]
        return MoELayer(module, info, taps, router)
