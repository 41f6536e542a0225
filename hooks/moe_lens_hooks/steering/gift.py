"""Ids and weights put into the experts' hands: the arguments that an adapter reads, replaced.

Legend: T tokens, K choices per token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens_hooks.adapter import MoELayer, Observed, Read
from moe_lens_hooks.steering.choice import OWN
from moe_lens_hooks.steering.source import Wanted


def given(
    wanted: Wanted,
    read: Read,
    before: Observed,
    layer: MoELayer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The experts' arguments with the wanted ids and weights; None: these are not the experts'.

    Raises:
        UnsupportedRouter: The experts are not called with plain ids and weights.
        SteeringError: They are called with other shapes.
    """
    seen = copy.copy(before)
    seen.problems, seen.notes = {}, {}
    read(seen, args, kwargs, None)
    ids, weights = seen.expert_ids_TK, seen.weights_TK
    if ids is before.expert_ids_TK and weights is before.weights_TK:
        return None
    at = [*enumerate(args), *kwargs.items()]
    where_ids = [key for key, value in at if value is ids]
    where_weights = [key for key, value in at if value is weights]
    if ids is None or weights is None or not where_ids or not where_weights:
        raise not_plain(layer)
    if wanted.give is not None:
        chosen, gates = wanted.give(ids, weights)
        wanted.ids_TK = chosen
        return _with({where_ids[0]: chosen, where_weights[0]: gates}, args, kwargs)
    assert wanted.weights_TK is not None
    assert wanted.ids_TK is not None
    if wanted.ids_TK.shape != ids.shape:
        raise SteeringError(
            f"the experts of {layer.info.path} get ids {list(ids.shape)}, but decisions are "
            f"{list(wanted.ids_TK.shape)}. Force the batch that was recorded."
        )
    chosen = wanted.ids_TK.to(ids)
    gates = wanted.weights_TK.to(weights)
    own = chosen == OWN
    new = {
        where_ids[0]: torch.where(own, ids, chosen),
        where_weights[0]: torch.where(own, weights, gates),
    }
    return _with(new, args, kwargs)


def _with(
    new: dict[Any, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, some of them replaced, by place or by name."""
    changed = [new.get(i, value) for i, value in enumerate(args)]
    return tuple(changed), {name: new.get(name, value) for name, value in kwargs.items()}


def not_plain(layer: MoELayer) -> UnsupportedRouter:
    """The error of experts that are called in another way."""
    return UnsupportedRouter(
        f"the experts of {layer.info.path} are not called with plain ids and weights (adapter "
        f'{layer.info.adapter}), so they cannot be given recorded ones. Use weights="router".'
    )
