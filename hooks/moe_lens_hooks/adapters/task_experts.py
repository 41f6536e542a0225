"""ViTPose: the caller names the expert, by the data set that an image is of.

    y = concat(fc2(h), experts(h, indices))       indices: one per image, in range

There is no router, hence no logits and no gate: every token of an image has its image's expert,
whose output enters unscaled, which is a weight of 1. (All experts are computed on all tokens; those
that were not named are multiplied by zero.)

Legend: B images, S tokens of each, T = B x S.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_number, stream_of


class TaskExperts:
    """Block with `part_features` and `experts(hidden_state, indices)`, an `nn.ModuleList`."""

    name = "task-experts"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.ModuleList) or not hasattr(experts, "part_features"):
            return None
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=len(experts),
            top_k=1,
            block=first_number(path),
            stream=stream_of(path),
            router="task",
            adapter=self.name,
            shared_experts=1,
            hidden_size=int(module.fc1.in_features),  # type: ignore[union-attr, arg-type]
            intermediate_size=int(module.fc1.out_features),  # type: ignore[union-attr, arg-type]
        )

        def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            hidden_BSF, indices_B11 = (*args, *kwargs.values())[:2]
            B, S, _ = hidden_BSF.shape
            seen.expert_ids_TK = indices_B11.detach().expand(B, S, 1).reshape(-1, 1)
            seen.weights_TK = hidden_BSF.new_ones((B * S, 1))

        return MoELayer(module, info, [Tap(experts, "input", read)])
