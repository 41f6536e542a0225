"""DeepSpeed's AutoEP: what it puts in the place of a transformers block, to spread its experts.

    weights_TK, expert_ids_TK, rows_E = router(x_TD, expert_bias)       scores, not logits
    y = combine(experts(dispatch(x)))        in the block's own forward, with exactly these

The design is torchtitan's. Nothing is dropped. Logits are the output of the router's `gate`. `rows`
counts the choices, and is compared with them.

Legend: T tokens, K choices per token, E experts, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number
from moe_lens_hooks.adapters.torch_calls import derives, rows_of_each


class AutoEP:
    """`AutoEPMoELayer` of deepspeed.module_inject."""

    name = "autoep"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if not derives(module, "deepspeed", "AutoEPMoELayer"):
            return None
        # Any: attributes of DeepSpeed's own classes, which only this adapter knows
        block: Any = module
        router, count = block.router, int(block.num_experts)
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=int(block.top_k),
            block=first_number(path),
            adapter=self.name,
            groups=first_int(router, "num_expert_groups"),
            top_groups=first_int(router, "num_limited_groups"),
            shared_experts=0 if block.shared_experts is None else 1,
            hidden_size=int(block.hidden_size),
            weights_on="input" if block.score_apply == "pre" else "output",
        )

        def read_gate(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.logits_TE = output.reshape(-1, count)

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.weights_TK, seen.expert_ids_TK, rows_E = output
            seen.bias_E = args[1] if len(args) > 1 else kwargs.get("expert_bias")
            wrong_E = rows_of_each(output[1], count) - rows_E
            seen.problems["rows counted for another expert than was chosen"] = wrong_E.abs().sum()

        taps = [Tap(router.gate, "output", read_gate), Tap(router, "output", read_router)]
        return MoELayer(module, info, taps, router)
