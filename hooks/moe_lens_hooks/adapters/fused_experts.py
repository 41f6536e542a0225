"""transformers 5: an `experts` module that is called with ids and weights (67 of 75 models).

    logits, weights, ids = router(x)          a sibling of experts in the block
    y = experts(x, ids, weights)              what it is given is what runs

Recognised by the names of the arguments of `experts.forward`, not by class, so it also serves
models that copy the pattern. The argument names differ between models; so does what the router
returns (dbrx: bare logits). Ids and weights come from the experts' input, after bias, group limit,
normalisation and scaling.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard

from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import (
    MoELayer,
    Observed,
    Read,
    Tap,
    first_int,
    first_number,
    stream_of,
)

_PAIRS = [
    ("top_k_index", "top_k_weights"),
    ("router_indices", "routing_weights"),
    ("expert_ids", "weights"),
]
_ROUTERS = ("gate", "router")


class FusedExperts:
    """Block with children `experts(x, ids, weights)` and `gate` or `router`."""

    name = "fused-experts"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        experts = getattr(module, "experts", None)
        names = _argument_names(experts)
        if not isinstance(experts, nn.Module) or names is None:
            return None
        found = (getattr(module, n, None) for n in _ROUTERS)
        router = next((r for r in found if isinstance(r, nn.Module)), None)
        count = first_int(experts, "num_experts", "num_local_experts", "n_routed_experts")
        if count is None:
            raise UnsupportedRouter(
                f"{path} ({type(module).__name__}) calls experts with ids and weights, but "
                f"{type(experts).__name__} has no num_experts to check the ids against. "
                "Write an adapter (docs/hooks.md) that states it."
            )
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=first_int(router, "top_k") or first_int(module, "top_k", "num_experts_per_tok"),
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=_shared(module),
            hidden_size=first_int(experts, "hidden_dim", "hidden_size"),
            intermediate_size=first_int(experts, "intermediate_dim", "intermediate_size"),
        )
        taps = [Tap(experts, "input", _read_experts(experts, *names))]
        if router is not None:
            taps.append(Tap(router, "output", _read_router(count)))
        return MoELayer(module, info, taps, router)


def _argument_names(experts: object) -> tuple[str, str] | None:
    if not isinstance(experts, nn.Module):
        return None
    parameters = _parameters(experts)
    return next((pair for pair in _PAIRS if all(n in parameters for n in pair)), None)


def _parameters(experts: nn.Module) -> list[str]:
    # Of the class: libraries put wrappers with other signatures on instances (expert parallelism).
    return list(inspect.signature(type(experts).forward).parameters)[1:]


def _read_experts(experts: nn.Module, ids: str, weights: str) -> Read:
    order = _parameters(experts)
    at = order.index(ids), order.index(weights)

    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        seen.expert_ids_TK = args[at[0]] if at[0] < len(args) else kwargs.get(ids)
        seen.weights_TK = args[at[1]] if at[1] < len(args) else kwargs.get(weights)

    return read


def _read_router(experts: int) -> Read:
    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        logits = parts[0]
        if _is_float(logits) and logits.ndim >= 2 and logits.shape[-1] == experts:
            seen.logits_TE = logits.reshape(-1, experts)
        if len(parts) >= 3 and isinstance(parts[2], Tensor) and not parts[2].is_floating_point():
            seen.router_ids_TK = parts[2]
        # Some routers are handed their selection bias instead of owning it.
        vectors = (a for a in args[1:] if isinstance(a, Tensor) and a.shape == (experts,))
        seen.bias_E = next(vectors, None)

    return read


def _is_float(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()


def _shared(block: nn.Module) -> int | None:
    names = [n for n, _ in block.named_children() if n.startswith("shared_") and "gate" not in n]
    return (first_int(block, "n_shared_experts", "num_shared_experts") or 1) if names else 0
