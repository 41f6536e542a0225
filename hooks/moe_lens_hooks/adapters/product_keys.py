"""Doge: experts of one neuron, found by the sum of two keys.

    (keys_x, keys_y)_TN = router_gate(x)        a token scores expert (i, j) keys_x[i] + keys_y[j]
    y = sum over the k best of weight * up_embed(id) * act(down_embed(id) . x)

The ids are what the embedding is asked for. The weights are in no module's input or output: they
are the softmax of the chosen scores, taken again here in the order in which the block takes it.

Legend: T tokens, K choices per token, E experts, N keys of each kind (N * N <= E).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number, stream_of

_CHILDREN = {"router_gate", "down_embed", "up_embed"}


class ProductKeys:
    """Block with children `router_gate`, `down_embed`, `up_embed`, and `num_keys`."""

    name = "product-keys"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        children = dict(module.named_children())
        if not set(children) >= _CHILDREN or not hasattr(module, "num_keys"):
            return None
        down, up = children["down_embed"], children["up_embed"]
        count, keys = int(module.num_experts), int(module.num_keys)  # type: ignore[arg-type]
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=first_int(module, "top_k"),
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=1 if "gate_proj" in children else 0,
            hidden_size=first_int(module, "hidden_size"),
            intermediate_size=1,
        )

        def read_down(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            seen.expert_ids_TK = (*args, *kwargs.values())[0]

        def read_up(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            ids_TK = (*args, *kwargs.values())[0]
            if ids_TK is not seen.expert_ids_TK:
                differ = (ids_TK != seen.expert_ids_TK).any(-1)
                seen.problems["tokens with other down than up projections"] = differ.sum()

        def read_block(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if seen.expert_ids_TK is None:
                return
            keys_2TN = output[1].detach()
            scores_TE = _scores(keys_2TN)
            chosen_TK = scores_TE.gather(-1, seen.expert_ids_TK)
            weights_TK = torch.softmax(chosen_TK, dim=-1)
            if getattr(module, "norm_topk_prob", False):
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            seen.weights_TK = weights_TK
            # experts that no pair of keys names, where their number is no square
            unnamed = count - keys * keys
            seen.logits_TE = torch.nn.functional.pad(scores_TE, (0, unnamed), value=-torch.inf)

        taps = [
            Tap(down, "input", read_down),
            Tap(up, "input", read_up),
            Tap(module, "output", read_block),
        ]
        return MoELayer(module, info, taps, children["router_gate"])


def _scores(keys_2TN: Tensor) -> Tensor:
    """Every expert's score: that of expert `i * N + j` is key i of the first kind plus key j."""
    return (keys_2TN[0].unsqueeze(-1) + keys_2TN[1].unsqueeze(-2)).flatten(-2)
