"""Switch Transformers: top-1 as a one-hot mask, with a capacity for each expert and sequence.

    mask_BSE, prob_BS1, logits_BSE = router(x)       rows of the mask are zero where dropped
    y = experts(x_TD, mask_T1E, prob_T1)

What the experts compute is the mask. Whom a dropped token wanted is in no tensor, so it is taken by
the router's own operations on its own logits, and compared with the mask wherever that has a row: a
disagreement is reported, not covered up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_number, stream_of


class Switch:
    """`SwitchTransformersSparseMLP` of transformers 5."""

    name = "switch"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if type(module).__name__ != "SwitchTransformersSparseMLP":
            return None
        # Any: attributes of transformers' own classes, which only this adapter knows
        router: Any = module.router
        experts: Any = module.experts
        count, capacity = int(router.num_experts), int(router.expert_capacity)
        dense: Any = experts.get_submodule("expert_0")
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=1,
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=int(dense.wi.in_features),
            intermediate_size=int(dense.wi.out_features),
            capacity_policy="drop-by-position",
        )

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            mask_BSE, _, logits_BSE = output
            seen.logits_TE = logits_BSE.detach().reshape(-1, count)
            seen.capacity, seen.capacity_groups = capacity, mask_BSE.shape[0]
            # As the router does it: rounding to the model's dtype can make ties, which argmax
            # breaks one way on probabilities and another on logits.
            probs = torch.softmax(logits_BSE.detach(), dim=-1, dtype=router.dtype)
            wanted_BS = probs.to(router.input_dtype).argmax(-1)
            seen.router_ids_TK = wanted_BS.reshape(-1, 1)

        def read_experts(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            names = ("hidden_states", "selected_experts", "routing_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            mask_TE = given["selected_experts"].detach().reshape(-1, count)
            weights_T1 = given["routing_weights"].detach().reshape(-1, 1)
            kept_T1 = mask_TE.any(-1, keepdim=True)
            assert seen.router_ids_TK is not None  # the router ran just before
            ran_T1 = mask_TE.argmax(-1, keepdim=True)
            seen.expert_ids_TK = torch.where(kept_T1, ran_T1, seen.router_ids_TK)
            seen.weights_TK, seen.kept_TK = weights_T1, kept_T1
            differ = kept_T1 & (ran_T1 != seen.router_ids_TK)
            seen.problems["tokens ran on another expert than their router chose"] = differ.sum()

        taps = [Tap(router, "output", read_router), Tap(experts, "input", read_experts)]
        return MoELayer(module, info, taps, router)
