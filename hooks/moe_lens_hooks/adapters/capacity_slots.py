"""A block whose experts are told which slots fit: the MoE of `moe_lens.demo`.

It is also the example of docs/hooks.md for a custom module.

    logits_TE, weights_TK, expert_ids_TK = router(x_TD)
    y_TD = experts(x_TD, expert_ids_TK, weights_TK, kept_TK)     kept_TK None: dropless

The block has `num_experts`, `top_k` and, after the router ran, `capacity` (None: dropless).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number


class CapacitySlots:
    """Block with children `router` and `experts(x, expert_ids, weights, kept)`."""

    name = "capacity-slots"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        router, experts = getattr(module, "router", None), getattr(module, "experts", None)
        if not (isinstance(router, nn.Module) and isinstance(experts, nn.Module)):
            return None
        if not (hasattr(module, "capacity") and hasattr(module, "capacity_factor")):
            return None
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=int(module.num_experts),  # type: ignore[arg-type]
            top_k=int(module.top_k),  # type: ignore[arg-type]
            block=first_number(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=first_int(experts, "hidden_size"),
            intermediate_size=first_int(experts, "intermediate_size"),
            capacity_policy="drop-by-position",
        )

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.logits_TE, _, seen.router_ids_TK = output

        def read_experts(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            _, seen.expert_ids_TK, seen.weights_TK, seen.kept_TK = args
            seen.capacity = module.capacity  # type: ignore[assignment]

        taps = [Tap(router, "output", read_router), Tap(experts, "input", read_experts)]
        return MoELayer(module, info, taps, router)
