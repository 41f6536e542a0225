"""torchtitan: `routed_experts(x, scores, ids, counts)` behind a `TokenChoiceTopKRouter`.

    scores_BLK, ids_BLK, all_scores_BLE = router(x_BLD, expert_bias_E)      scores, not logits
    y_BLD = routed_experts(x_BLD, scores_BLK, ids_BLK, counts_E)
        inner_experts(rows_RD, rows_of_each_expert)          after the all-to-all, on its own rank

Logits are the output of the router's `gate`. No dispatcher of torchtitan drops, but one: HybridEP
with a capacity factor, which says nowhere what it dropped, and is refused. Sharded tensors (tensor
parallelism) are a breach: each rank would see a part.

DeepSpeed's AutoEP puts a block of the same design in the place of a transformers block.

Legend: B sequences, L their tokens, T = B L, K choices per token, E experts, D hidden, R rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_int, first_number
from moe_lens_hooks.adapters.torch_calls import derives, rows_of_each

_COUNTING = ("LocalTokenDispatcher", "AllToAllTokenDispatcher")
"""Dispatchers that tell each expert's rows without slots to spare."""


class Torchtitan:
    """`MoE` of torchtitan.models.common.moe, and what inherits from it."""

    name = "torchtitan"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if not derives(module, "torchtitan", "MoE"):
            return None
        # Any: attributes of torchtitan's own classes, which only this adapter knows
        router: Any = module.router
        routed: Any = module.routed_experts
        experts, dispatcher = routed.inner_experts, routed.token_dispatcher
        if getattr(dispatcher, "non_blocking_capacity_factor", None) is not None:
            raise UnsupportedRouter(
                f"{path} dispatches with {type(dispatcher).__name__} and "
                f"non_blocking_capacity_factor={dispatcher.non_blocking_capacity_factor}, which "
                "drops tokens without saying which. Set it to None (blocking, dropless) to record."
            )
        count = int(router.num_experts)
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=int(router.top_k),
            block=first_number(path),
            adapter=self.name,
            groups=first_int(router, "num_expert_groups"),
            top_groups=first_int(router, "num_limited_groups"),
            shared_experts=0 if getattr(module, "shared_experts", None) is None else 1,
            hidden_size=int(router.gate.in_features),
        )

        def read_gate(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.logits_TE = _whole(output).reshape(-1, count)

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen.router_ids_TK = _whole(output[1]).reshape(-1, output[1].shape[-1])
            seen.bias_E = args[1] if len(args) > 1 else kwargs.get("expert_bias_E")

        def read_experts(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            _, weights_BLK, ids_BLK, counts_E = (_whole(x) for x in (*args, *kwargs.values()))
            seen.expert_ids_TK = ids_BLK.reshape(-1, ids_BLK.shape[-1])
            seen.weights_TK = weights_BLK.reshape(-1, weights_BLK.shape[-1])
            wrong_E = rows_of_each(seen.expert_ids_TK, count) - counts_E
            seen.problems["rows counted for another expert than was chosen"] = wrong_E.abs().sum()

        def read_rows(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            given = (*args, *kwargs.values())[1]
            mesh = getattr(dispatcher, "ep_mesh", None)
            first = 0 if mesh is None else int(mesh.get_local_rank()) * len(given)
            received_E = given.new_zeros(count)
            received_E[first : first + len(given)] = given
            seen.received_E = received_E

        taps = [
            Tap(router.gate, "output", read_gate),
            Tap(router, "output", read_router),
            Tap(routed, "input", read_experts),
            *([Tap(experts, "input", read_rows)] if type(dispatcher).__name__ in _COUNTING else []),
        ]
        return MoELayer(module, info, taps, router)


def _whole(x: Tensor) -> Tensor:
    """The tensor itself; one that is sharded over ranks is refused."""
    if hasattr(x, "to_local"):
        raise ValueError(
            f"{type(x).__name__} {list(x.shape)}: tensor parallelism is not recorded in torchtitan"
        )
    return x
