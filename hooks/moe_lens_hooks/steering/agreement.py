"""Did the experts get what was wanted, and if not, why.

Legend: T tokens, K choices per token.
"""

from __future__ import annotations

from torch import Tensor

from moe_lens.errors import MoeLensError, SteeringError, UnsupportedRouter
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.choice import OWN, Choice
from moe_lens_hooks.steering.source import Wanted

_GIVEN = {
    "hash": "This router looks experts up by token id: the text is another one",
    "task": "The caller names the experts: the input is another one",
}


def agrees(layer: MoELayer, wanted: Wanted, got_TK: Tensor) -> Tensor:
    """By token, whether its experts are the wanted ones, in any order; on the device.

    Raises:
        SteeringError: The shapes differ.
    """
    assert wanted.ids_TK is not None
    want_TK = wanted.ids_TK.to(got_TK.device)
    if got_TK.shape != want_TK.shape:
        raise SteeringError(
            f"the experts of {layer.info.path} got ids {list(got_TK.shape)}, but decisions are "
            f"{list(want_TK.shape)}."
        )
    in_place_T = ((got_TK == want_TK) | (want_TK == OWN)).all(-1)
    as_set_T = (got_TK.sort(-1).values == want_TK.sort(-1).values).all(-1)
    return in_place_T | as_set_T


def other_experts(
    layer: MoELayer, wanted: Wanted, choice: Choice | None, got_TK: Tensor, agreed_T: Tensor
) -> MoeLensError:
    """The error of a layer whose experts got other ids than wanted."""
    assert wanted.ids_TK is not None
    info = layer.info
    token = int((~agreed_T).nonzero()[0])
    differ = (
        f"{info.path}: {int((~agreed_T).sum())} of {len(agreed_T)} tokens went to other experts "
        f"than wanted (token {token}: wanted {wanted.ids_TK[token].tolist()}, went to "
        f"{got_TK[token].tolist()})"
    )
    router = type(layer.router).__name__ if layer.router is not None else "its router"
    if info.router in _GIVEN:
        return SteeringError(f"{differ}. {_GIVEN[info.router]}, so there is nothing to force.")
    if choice is not None and choice.calls == 0:
        return UnsupportedRouter(
            f"{differ}. {router} makes its choice by none of torch.topk, argmax or max over "
            f"{choice.over} experts, so that it cannot be forced from inside. Give the experts "
            'their ids and weights: weights="recorded".'
        )
    hint = ""
    if layer.block.training:
        hint = " In training this router may draw its experts at random: call model.eval()."
    return UnsupportedRouter(f"{differ}.{hint}")
