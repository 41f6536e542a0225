"""megatron-core: a `MoELayer` whose router says, as dense masks, what is left after dropping.

    probs_TE, routing_map_TE = router(x_SBD)             after apply_router_token_dropping
    y = experts(rows, rows_of_each_expert, …)            after the all-to-all, on the experts' rank

The choices before anything is dropped, and the logits, live inside `router.routing` only. While the
router runs, its method `routing` and the function `apply_router_token_dropping` that it calls are
wrapped; both are put back when it returns or raises. Another thread's call goes through unseen.

Tokens come as `[S, B, D]`: record with `layout="sb"`; another layout is refused. `received` counts
the rows that the experts of this rank were given, from all ranks and with padding slots. It is null
under tensor parallelism of the model or of its experts: each row is given to several ranks.

Legend: S positions, B sequences, T = S B tokens, K choices per token, E experts, D hidden.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouter
from moe_lens.trace.meta import LayerInfo
from moe_lens_hooks.adapter import MoELayer, Observed, Tap, first_number
from moe_lens_hooks.adapters.torch_calls import derives

DROPPING = "apply_router_token_dropping"
_GIVEN = ("routing_probs", "routing_map", "router_topk", "capacity_factor")
"""Its arguments that are read."""
_ASKED = ("num_tokens", "num_experts", "capacity_factor")
"""Arguments of `get_capacity`, which it calls."""


@dataclass
class _Call:
    """What was seen inside the router in the call that is running."""

    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    """Before dropping; None where nothing can be dropped."""
    map_TE: Tensor | None = None
    capacity: int | None = None
    unread: bool = False
    """What is dropped could not be read."""
    rows_E: Tensor | None = None
    """Rows that were dispatched to each expert, padding slots included."""


class Megatron:
    """`MoELayer` of megatron.core.transformer.moe."""

    name = "megatron"

    def layer(self, path: str, module: nn.Module) -> MoELayer | None:
        if not derives(module, "megatron", "MoELayer"):
            return None
        # Any: attributes of Megatron's own classes, which only this adapter knows
        block: Any = module
        router, config = block.router, block.config
        if config.sequence_parallel and config.tensor_model_parallel_size > 1:
            raise UnsupportedRouter(
                f"{path} is sequence parallel over {config.tensor_model_parallel_size} ranks: each "
                "routes a slice of every sequence, whose positions would be numbered from 0. Not "
                "recorded yet; sequence_parallel=False is."
            )
        K, count = int(config.moe_router_topk), int(config.num_moe_experts)
        drops = config.moe_expert_capacity_factor is not None
        namespace = _namespace(path, router, drops)
        info = LayerInfo(
            layer=-1,
            path=path,
            experts=count,
            top_k=K,
            block=first_number(path),
            adapter=self.name,
            groups=config.moe_router_num_groups,
            top_groups=config.moe_router_group_topk,
            shared_experts=1 if block.use_shared_expert else 0,
            hidden_size=int(config.hidden_size),
            intermediate_size=config.moe_ffn_hidden_size,
            dispatch_width=getattr(config, "moe_latent_size", None),
            capacity_policy=_policy(config) if drops else None,
            weights_on="input" if config.moe_apply_probs_on_input else "output",
        )
        call = _Call()

        @contextmanager
        def around(seen: Observed) -> Iterator[None]:
            call.__init__()  # type: ignore[misc]
            with _watched(router, namespace, call):
                yield

        def read_router(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            probs_TE, map_TE = (x.detach() for x in output)
            wish_TE = map_TE if call.map_TE is None else call.map_TE
            score_TE = probs_TE if call.probs_TE is None else call.probs_TE
            # most weight first; a choice whose weight is rounded to zero is still a choice
            best = score_TE.masked_fill(~wish_TE, -torch.inf).topk(K, -1)
            seen.expert_ids_TK = best.indices
            seen.weights_TK = probs_TE.gather(-1, best.indices)
            seen.logits_TE = call.logits_TE
            seen.bias_E = router.expert_bias
            wrong_T = wish_TE.sum(-1) != K
            seen.problems["tokens with more or fewer choices than top-k"] = wrong_T.sum()
            if call.unread:
                seen.problems["calls of the router in which dropping could not be read"] = 1
            if drops:
                seen.kept_TK = map_TE.gather(-1, best.indices)
                seen.capacity = call.capacity
            call.rows_E = map_TE.sum(0)

        first, local = int(block.local_expert_indices[0]), int(block.num_local_experts)
        whole = block.token_dispatcher.tp_size == 1  # each expert is on one rank
        alone = local == count and whole
        given_once = whole and config.tensor_model_parallel_size == 1
        padded = config.moe_router_padding_for_quantization

        def read_experts(
            seen: Observed, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            assert call.rows_E is not None  # the router ran just before
            given_E = torch.zeros_like(call.rows_E)
            given_E[first : first + local] = (*args, *kwargs.values())[1].to(given_E)
            if given_once:
                seen.received_E = given_E
            if alone and not padded:
                wrong = (given_E - call.rows_E).abs().sum()
                seen.problems["rows given to experts, not those that were routed"] = wrong
            call.__init__()  # type: ignore[misc]  # keeps no tensor until the next forward

        taps = [
            Tap(router, "around", around=around),
            Tap(router, "output", read_router),
            Tap(block.experts, "input", read_experts),
        ]
        return MoELayer(module, info, taps, router, layout="sb")


def _policy(config: Any) -> str:
    return f"drop-by-{'probability' if config.moe_token_drop_policy == 'probs' else 'position'}"


def _namespace(path: str, router: Any, drops: bool) -> dict[str, Any]:
    """The globals in which the router looks up the function that drops.

    Raises:
        UnsupportedRouter: It has no `routing`, or drops in a way that is not known here.
    """
    routing = getattr(type(router), "routing", None)
    known = derives(router, "megatron", "TopKRouter") and inspect.isfunction(routing)
    namespace = inspect.unwrap(routing).__globals__ if known and routing else {}
    if not known or (drops and not _readable(namespace.get(DROPPING))):
        version = getattr(sys.modules.get("megatron.core"), "__version__", "unknown")
        what = "drops tokens in a way" if known else f"has a {type(router).__name__}"
        raise UnsupportedRouter(
            f"{path} {what} whose choices cannot be seen here (megatron-core {version}; known is "
            f"0.16's TopKRouter, which calls {DROPPING}). Write an adapter (docs/hooks.md)."
        )
    return namespace


def _readable(dropping: Any) -> bool:
    """It can be asked what it is given, and finds a capacity as is known here."""
    if not inspect.isfunction(dropping):
        return False
    find = inspect.unwrap(dropping).__globals__.get("get_capacity")
    named = ((dropping, _GIVEN), (find, _ASKED))
    return callable(find) and all(
        set(names) <= inspect.signature(function).parameters.keys() for function, names in named
    )


@contextmanager
def _watched(router: Any, namespace: dict[str, Any], call: _Call) -> Iterator[None]:
    """Wraps what is called inside the router, for the time of one call of it."""
    thread = threading.get_ident()
    routing, dropping = router.routing, namespace.get(DROPPING)

    def see_logits(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            call.logits_TE = logits.detach().reshape(-1, logits.shape[-1])
        return routing(logits, *args, **kwargs)

    def see_choices(*args: Any, **kwargs: Any) -> Any:
        assert dropping is not None
        if threading.get_ident() == thread:
            try:  # nothing that goes wrong here may end the router's call
                given = inspect.signature(dropping).bind(*args, **kwargs).arguments
                call.capacity = _capacity(dropping, given)
                call.probs_TE, call.map_TE = given["routing_probs"].detach(), given["routing_map"]
            except Exception:
                call.unread = True
        return dropping(*args, **kwargs)

    own = "routing" in vars(router)
    router.routing = see_logits
    if dropping is not None:
        namespace[DROPPING] = see_choices
    try:
        yield
    finally:
        if own:
            router.routing = routing
        else:
            del router.routing
        if dropping is not None:
            namespace[DROPPING] = dropping


def _capacity(dropping: Any, given: dict[str, Any]) -> int:
    """As the function itself finds it: by its own module's `get_capacity`."""
    find = inspect.unwrap(dropping).__globals__["get_capacity"]
    T, experts = given["routing_map"].shape
    choices, factor = T * given["router_topk"], given["capacity_factor"]
    return int(find(num_tokens=choices, num_experts=experts, capacity_factor=factor))
