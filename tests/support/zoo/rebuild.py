"""Builds the output of a layer's experts again from captured ids and weights.

Every expert is run alone on the input that the layer had, with the weight one, and the captured
weights do the rest. How one expert is run depends on the form of its weights; nothing here asks the
router or an adapter.

Legend: T tokens, K choices per token, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from support.zoo.ablation import one_module_each, silenced
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from support.zoo.proof import Call, Captured

Alone = Callable[[int, Tensor, Tensor], Tensor]
"""(expert, x_ND, weight_N1 as captured) to what these tokens get of it, `[N, D]`."""


def rebuild(block: nn.Module, call: Call, captured: Captured) -> float | None:
    """How far the output is from the one that the captured weights give.

    Args:
        block: The MoE block.
        call: The call of its experts in the forward, or of the block itself where experts are not
            called alone.
        captured: What the trace says of the layer.

    Returns:
        Largest difference of a token, as a share of its sum of absolute contributions; None for
        a form of experts that is not known here.
    """
    ids, weights = captured.ids, captured.weights
    # Zaya's skipped choice weighs nothing; asked for alone, its kernel returns unset memory.
    kept = captured.kept & (weights != 0)
    T, E = len(ids), captured.info.experts
    inputs = call.args[0] if call.args else call.kwargs["hidden_states"]
    form = _called(call.module, E) if call.module is not block else _whole(block)
    if form is None:
        return None
    x_TKD = inputs.reshape(T, 1, -1).expand(-1, ids.shape[1], -1)
    if hasattr(getattr(block, "experts", None), "reduce"):
        x_TKD = _attended(block, call)
    got_TD = call.output_rows(T)
    total_TD = torch.zeros_like(got_TD)
    if call.module is block:  # beside the experts it adds a bias or a shared expert
        with ExitStack() as stack:
            for e in range(E):
                stack.enter_context(silenced(block, e, E))
            total_TD = call.again_rows(T)
    scale_T = total_TD.abs().amax(-1)
    with torch.no_grad():
        for k in range(ids.shape[1]):
            for e in ids[kept[:, k], k].unique().tolist():
                at = (ids[:, k] == e) & kept[:, k]
                part = form(e, x_TKD[at, k], weights[at, k : k + 1])
                total_TD[at] += part
                scale_T[at] += part.abs().amax(-1)
    difference_T = (got_TD - total_TD).abs().amax(-1)
    return float((difference_T / scale_T.clamp_min(1e-30)).max())


def _called(experts: Any, E: int) -> Alone:
    """Experts that are a module of the block: each a module, or called with ids and weights."""
    if each := one_module_each(experts, E):
        share = 1 - getattr(
            experts, "moe_token_dropout", 0.0
        )  # nllb multiplies when it does not drop
        return lambda e, x, w: each[e](x) * w * share

    def alone(e: int, x_ND: Tensor, weight_N1: Tensor) -> Tensor:
        # Two choices of the same expert, the second for nothing: longcat cannot be called with one.
        ids = torch.full((len(x_ND), 2), e)
        one = torch.tensor([[1.0, 0.0]]).expand(len(x_ND), 2)
        out: Tensor = experts.forward(x_ND, ids, one)
        return out.reshape(len(x_ND), -1) * weight_N1

    return alone


def _whole(block: Any) -> Alone | None:
    """Experts inside the block's own forward, told by the names of their weights."""
    experts = getattr(block, "experts", block)
    if hasattr(block, "down_embed"):  # doge: an expert is a row of each embedding

        def row(e: int, x: Tensor, w: Tensor) -> Tensor:
            inner = x @ block.down_embed.weight[e]
            out: Tensor = block.act_fn(inner)[:, None] * w * block.up_embed.weight[e]
            return out

        return row
    if hasattr(experts, "reduce"):  # jetmoe, attention: x is what was attended to
        return lambda e, x, w: F.linear(x, experts.output_linear.weight[e]) * w
    if hasattr(block, "input_linear"):  # jetmoe

        def linear(e: int, x: Tensor, w: Tensor) -> Tensor:
            gate, up = F.linear(x, block.input_linear.weight[e]).chunk(2, dim=-1)
            return F.linear(block.activation(gate) * up, block.output_linear.weight[e]) * w

        return linear
    if hasattr(experts, "gate_up_proj"):  # llama4: the weight is on the input

        def scaled(e: int, x: Tensor, w: Tensor) -> Tensor:
            gate, up = ((x * w) @ experts.gate_up_proj[e]).chunk(2, dim=-1)
            out: Tensor = (up * experts.act_fn(gate)) @ experts.down_proj[e]
            return out

        return scaled
    return None


def _attended(block: Any, call: Call) -> Tensor:
    """What each choice of a token attended to, `[T, K, D]`."""
    seen: list[Tensor] = []
    reduce = block.experts.reduce

    def watched(x_BSKD: Tensor, topology: Any) -> Any:
        seen.append(x_BSKD.flatten(0, 1))
        return reduce(x_BSKD, topology)

    block.experts.reduce = watched
    try:
        call.again()
    finally:
        del block.experts.reduce
    return seen[0]
