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
from moe_lens_hooks.semantics import groups_of

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
        hidden, width, inner = _widths(experts, count)
        groups, top_groups = groups_of(router, count)
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=first_int(router, "top_k") or first_int(module, "top_k", "num_experts_per_tok"),
            block=first_number(path),
            stream=stream_of(path),
            adapter=self.name,
            shared_experts=_shared(module, experts),
            groups=groups,
            top_groups=top_groups,
            hidden_size=hidden,
            intermediate_size=inner,
            dispatch_width=width if width != hidden else None,
            output_scale=_output_scale(module, router),
        )
        taps = [Tap(experts, "input", read_experts(experts, *names), alone=True)]
        if router is not None:
            taps.append(Tap(router, "output", read_router(count), alone=True))
        return MoELayer(module, info, taps, router)


def _widths(experts: nn.Module, count: int) -> tuple[int | None, int | None, int | None]:
    """Of the model, of what the experts are given, and inside an expert.

    Nemotron-H and Muse Spark project to a narrower space before their experts. What a module says
    of its input may still be the model's width then, so the weights decide.
    """
    inner = first_int(experts, "intermediate_dim", "intermediate_size", "ffn_hidden_size")
    config, down = getattr(experts, "config", None), getattr(experts, "down_proj", None)
    hidden = first_int(config, "hidden_size") or first_int(experts, "hidden_dim", "hidden_size")
    width = down.numel() // (count * inner) if isinstance(down, Tensor) and inner else hidden
    return hidden, width, inner


def _argument_names(experts: object) -> tuple[str, str] | None:
    if not isinstance(experts, nn.Module):
        return None
    parameters = _parameters(experts)
    return next((pair for pair in _PAIRS if all(n in parameters for n in pair)), None)


def _parameters(experts: nn.Module) -> list[str]:
    # Of the class: libraries put wrappers with other signatures on instances (expert parallelism).
    return list(inspect.signature(type(experts).forward).parameters)[1:]


def read_experts(experts: nn.Module, ids: str, weights: str) -> Read:
    """Reads what `experts` is given, under the names of its two arguments."""
    order = _parameters(experts)
    at = order.index(ids), order.index(weights)

    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        seen.expert_ids_TK = args[at[0]] if at[0] < len(args) else kwargs.get(ids)
        given = args[at[1]] if at[1] < len(args) else kwargs.get(weights)
        if seen.expert_ids_TK is not None and given is not None:
            # transformers 4 hands gpt-oss and Qwen3-VL a gate for every expert, mostly zeros
            here = given.shape[-1] == seen.expert_ids_TK.shape[-1]
            dense = not here and given.shape[-1] == getattr(experts, "num_experts", None)
            given = given.gather(-1, seen.expert_ids_TK) if dense else given
        seen.weights_TK = given

    return read


def read_router(experts: int) -> Read:
    """Reads a router's output `(logits, weights, ids, …)` or logits, over so many experts."""

    def read(seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        logits = parts[0]
        scores = len(parts) == 2  # (scores, ids), as gpt-oss has it in transformers 4: no logits
        if _is_float(logits) and not scores and logits.shape[-1:] == (experts,):
            seen.logits_TE = logits.reshape(-1, experts)
        if len(parts) >= 3 and isinstance(parts[2], Tensor) and not parts[2].is_floating_point():
            seen.router_ids_TK = parts[2]
        # Some routers are handed their selection bias instead of owning it.
        vectors = (a for a in args[1:] if isinstance(a, Tensor) and a.shape == (experts,))
        seen.bias_E = next(vectors, None)

    return read


def _output_scale(block: nn.Module, router: object) -> float | None:
    """Blocks that scale what the experts give together have the factor; else the router has it."""
    if type(block).__name__ == "OpenAIPrivacyFilterMLP":
        return float(block.num_experts)  # type: ignore[arg-type]
    scale = getattr(block, "routed_scaling_factor", None)
    if isinstance(scale, int | float) and not hasattr(router, "routed_scaling_factor"):
        return float(scale)
    return None


def _is_float(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()


def _shared(block: nn.Module, experts: nn.Module) -> int:
    """Experts that every token passes: in the block, or beside it (Granite, Ernie 4.5 VL)."""
    config = getattr(experts, "config", None)
    names = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    if any(n.startswith("shared_") and "gate" not in n for n, _ in block.named_children()):
        return first_int(block, *names) or first_int(config, *names) or 1
    beside = 1 if first_int(config, "shared_intermediate_size") else 0
    return first_int(config, "moe_num_shared_experts") or beside
