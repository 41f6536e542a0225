"""JetMoE: tokens sorted by expert, for its MLP experts and for its attention experts.

    order, batch_index, gates, sizes, logits_TE = router(x_TD)
    y = output_linear(f(input_linear(x[batch_index], sizes)), sizes) * gates

`sizes[e]` rows in a row go to expert e, `order[j]` says which choice (token x k + slot) row j is.
An expert may have no row. The attention experts' module (`JetMoeMoA`) is never called: its methods
`map` and `reduce` are, so the block is the attention that holds it.

Legend: T tokens, K choices per token, E experts, D hidden, N = T x K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number, stream_of


class SortedDispatch:
    """Block (or attention with `experts`) with `router`, `input_linear`, `output_linear`."""

    name = "sorted-dispatch"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if _dispatches(module):
            # The attention's experts are reached through the attention, above them.
            return None if _has_methods(module) else self._layer(path, module, module, "mlp")
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and _dispatches(experts) and _has_methods(experts):
            return self._layer(path, module, experts, "attention")
        return None

    def _layer(self, path: str, block: nn.Module, owner: nn.Module, role: str) -> MoELayer:
        router, first = owner.get_submodule("router"), owner.get_submodule("input_linear")
        count = int(router.num_experts)  # type: ignore[arg-type]
        width = first_int(first, "output_size")
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=first_int(router, "top_k"),
            block=first_number(path),
            role=role,
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=0,
            hidden_size=first_int(first, "input_size"),
            # an MLP's first matrix makes gate and up, an attention's makes queries
            intermediate_size=width // 2 if width and role == "mlp" else width,
        )

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            order_N, batch_index_N, gates_N, sizes, logits_TE = output
            seen.logits_TE = logits_TE
            T = len(logits_TE)
            order_N = order_N.detach()
            K = len(order_N) // T if T else int(router.top_k)  # type: ignore[arg-type]
            seen.expert_ids_TK = _unsorted(_experts(sizes, order_N), order_N, T, K)
            seen.weights_TK = _unsorted(gates_N.detach(), order_N, T, K)
            wrong_N = order_N.div(K, rounding_mode="floor") != batch_index_N
            seen.problems["rows of experts that belong to another token"] = wrong_N.sum()

        def read_experts(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            inputs_ND, sizes = (*args, *kwargs.values())[:2]
            ids = seen.expert_ids_TK
            if ids is None or len(inputs_ND) != ids.numel() or sum(sizes) != ids.numel():
                seen.problems["rows given to experts, not those that were routed"] = len(inputs_ND)

        taps = [Tap(router, "output", read_router), Tap(first, "input", read_experts)]
        return MoELayer(block, info, taps, router)


def _dispatches(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return {"router", "input_linear", "output_linear"} <= set(children) and hasattr(
        children["router"], "top_k"
    )


def _has_methods(module: nn.Module) -> bool:
    return hasattr(module, "map") and hasattr(module, "reduce")


def _experts(sizes: list[int], like_N: Tensor) -> Tensor:
    """The expert of each row, from how many rows each has."""
    each_E = torch.tensor(sizes, device=like_N.device)
    ids_E = torch.arange(len(sizes), device=like_N.device)
    return torch.repeat_interleave(ids_E, each_E, output_size=sum(sizes))


def _unsorted(values_N: Tensor, order_N: Tensor, T: int, K: int) -> Tensor:
    return torch.empty_like(values_N).scatter_(0, order_N, values_N).view(T, K)
