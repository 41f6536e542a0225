"""ZAYA: the router has one class more than there are experts, to skip them all.

    logits_TE1, weights_TK, expert_ids_TK, _ = gate(x, states)       E1 = E + 1
    y_TD = experts(x_TD, expert_ids_TK, weights_TK)

A choice of class E reaches the experts rewritten to expert 0 with weight 0, which would look like
load on expert 0. It is recorded as what it is: the zero expert with id E. Should expert 0 itself
ever be given a weight of exactly 0, the router's own arithmetic on its own logits tells the two
apart.

Legend: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number, stream_of
from moe_lens_hooks.adapters.fused_experts import read_experts


class SkipClass:
    """Block with `experts` and `gate`, which has `num_router_classes` = `num_experts` + 1."""

    name = "skip-class"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        experts, gate = getattr(module, "experts", None), getattr(module, "gate", None)
        if not isinstance(experts, nn.Module) or not isinstance(gate, nn.Module):
            return None
        count, classes = first_int(experts, "num_experts"), first_int(gate, "num_router_classes")
        if count is None or classes != count + 1 or not hasattr(gate, "balancing_biases"):
            return None
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            zero_experts=1,
            top_k=first_int(gate, "top_k"),
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=first_int(experts, "hidden_dim"),
            intermediate_size=first_int(experts, "intermediate_dim"),
        )

        def read_gate(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.logits_TE = output[0].detach().reshape(-1, classes)

        given = read_experts(experts, "top_k_index", "top_k_weights")

        def read_ids(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            given(seen, args, kwargs, None)
            ids_TK, weights_TK = seen.expert_ids_TK, seen.weights_TK
            assert ids_TK is not None
            assert weights_TK is not None
            assert seen.logits_TE is not None  # the gate ran just before
            wish_TK = _wish(seen.logits_TE, gate.balancing_biases, ids_TK.shape[-1])  # type: ignore[arg-type]
            nothing_TK = (ids_TK == 0) & (weights_TK.detach() == 0)
            skipped_TK = nothing_TK & (wish_TK != 0)
            seen.expert_ids_TK = torch.where(skipped_TK, count, ids_TK)
            other_TK = skipped_TK & (wish_TK != count)
            seen.problems["choices of weight 0 that were not to skip the experts"] = other_TK.sum()

        taps = [Tap(gate, "output", read_gate), Tap(experts, "input", read_ids)]
        return MoELayer(module, info, taps, gate)


def _wish(logits_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """What the router chose before it rewrote it, in its own order."""
    probs_TE = torch.softmax(logits_TE, dim=-1).to(torch.float32)
    return torch.topk(probs_TE + bias_E, k, dim=-1).indices
