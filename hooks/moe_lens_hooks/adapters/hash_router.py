"""DeepSeek-V4's first layers: the experts of a token are looked up by its id in the vocabulary.

    logits_TE, weights_TK, expert_ids_TK = gate(x, input_ids)      ids = tid2eid[input_ids]
    y_TD = experts(x_TD, expert_ids_TK, weights_TK)

The logits weigh the experts but choose none: a distribution over experts, its entropy and a margin
do not exist, and are not recorded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moe_lens_hooks.adapter import MoELayer, Observed, Tap
from moe_lens_hooks.adapters.fused_experts import FusedExperts


class HashRouter:
    """A block of `FusedExperts` whose `gate` has a table `tid2eid`."""

    name = "hash-router"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        gate = getattr(module, "gate", None)
        if not isinstance(gate, nn.Module) or not hasattr(gate, "tid2eid"):
            return None
        layer = FusedExperts().layer(path, module)
        if layer is None:
            return None

        def read_gate(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.router_ids_TK = output[2]

        experts = layer.taps[0]
        info = replace(layer.info, adapter=self.name, router="hash")
        return MoELayer(module, info, [experts, Tap(gate, "output", read_gate)])
