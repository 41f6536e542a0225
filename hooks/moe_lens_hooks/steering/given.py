"""Ids given by hand: every forward routes by them.

Legend: L layers, T tokens, K choices per token, B sequences (rows), S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_lens.errors import SteeringError
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.choice import OWN
from moe_lens_hooks.steering.source import Key, Ticket, Wanted, check_ids

ByLayer = Tensor | Mapping[int, Tensor] | Mapping[str, Tensor]
"""`[L, T, K]`, or by layer (its number in call order, or the path of its block) `[T, K]`; one axis
more, `[B, S, K]`, is flattened."""


class Given:
    """Decisions for a batch, by layer.

    Args:
        ids: int; `OWN` leaves a token to its router.
        weights: Gate weights to give to the experts; None: the router's own.
        layers: The model's.

    Raises:
        ValueError: Shapes, types or layers that cannot be.
    """

    name = "expert_ids"

    def __init__(self, ids: ByLayer, weights: ByLayer | None, layers: list[MoELayer]) -> None:
        self._whole = isinstance(ids, Tensor)
        self._ids = {k: _flat(k, x, integer=True) for k, x in _by_layer("expert_ids", ids).items()}
        self._weights: dict[int | str, Tensor] = {}
        if weights is not None:
            given = _by_layer("weights", weights)
            self._weights = {k: _flat(k, x, integer=False) for k, x in given.items()}
        for k, x in self._ids.items() if weights is not None else ():
            got = list(self._weights[k].shape) if k in self._weights else "none"
            if got != list(x.shape):
                raise ValueError(f"layer {k!r}: expert_ids {list(x.shape)}, but weights {got}")
        self._numbers: dict[Key, int] = {}
        paths = sorted(x.info.path for x in layers)
        if unknown := [k for k in self._ids if isinstance(k, str) and k not in paths]:
            raise ValueError(
                f"no MoE layer is called {unknown[0]!r}; there are {len(paths)}: {paths[0]}, …"
            )
        if self._whole and len(self._ids) < len(layers):
            raise ValueError(
                f"expert_ids has {len(self._ids)} layers, the model {len(layers)} MoE layers. To "
                "force some of them only, give a dict of layer to ids."
            )
        if not self._ids:
            raise ValueError("expert_ids is empty: nothing would be forced.")

    def begin(self, inputs: dict[str, Any]) -> Ticket:
        return None

    def wanted(
        self,
        layer: MoELayer,
        times: int,
        ticket: Ticket,
        shape: tuple[int, ...],
        token_T: Tensor | None,
    ) -> Wanted | None:
        path = layer.info.path
        number = self._numbers.setdefault((path, times), len(self._numbers))
        name: int | str = path if path in self._ids else number
        if name not in self._ids:
            if self._whole:
                raise SteeringError(
                    f"{path} is the model's MoE layer {number}, but expert_ids has "
                    f"{len(self._ids)} layers (0 to {len(self._ids) - 1})."
                )
            return None
        check_ids(self._ids[name], layer, f"expert_ids of layer {name!r}")
        return Wanted(self._ids[name], self._weights.get(name))

    def end(self, ticket: Ticket, ran: set[Key]) -> tuple[int, int]:
        names = {path for path, _ in ran} | {self._numbers[key] for key in ran}
        if idle := [k for k in self._ids if k not in names]:
            raise SteeringError(
                f"expert_ids has decisions for layer {idle[0]!r}, but it did not run: the model "
                f"ran {len(ran)} MoE layers."
            )
        first = next(iter(self._ids.values()))
        forced = int((first != OWN).all(-1).sum())
        return forced, len(first) - forced

    def rewind(self) -> None:
        """Nothing to do: each forward is like the first."""


def _by_layer(what: str, given: ByLayer) -> dict[int | str, Tensor]:
    if isinstance(given, Tensor):
        if given.ndim not in (3, 4):
            raise ValueError(f"{what} is {list(given.shape)}; it must be [L, T, K] or [L, B, S, K]")
        return dict(enumerate(given))
    return dict(given.items())


def _flat(layer: int | str, x: Tensor, *, integer: bool) -> Tensor:
    wrong = x.is_floating_point() == integer or (x.dtype.itemsize == 1 and not x.dtype.is_signed)
    if wrong or x.ndim not in (2, 3):
        kind = "signed integers" if integer else "floats"
        raise ValueError(
            f"layer {layer!r}: {x.dtype} {list(x.shape)}; it must be {kind} [T, K] or [B, S, K]"
        )
    flat = x.detach().reshape(-1, x.shape[-1]).cpu()
    return flat.long() if integer else flat.float()
