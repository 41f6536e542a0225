"""Inside a router: the torch function that makes its choice is given the choice to make.

A router ends in one of a few functions of torch over the experts. While a forced block runs, a
mode of torch watches for them; the ids that they return are the forced ones, their values are
taken from their own input, and all that the router computes from there on (normalising, scaling,
gradients) is its own.

    topk with k = K over E scores            token choice, with or without bias, groups, scaling
    argmax over E scores, K times            Switch, NLLB: the n-th call is the n-th slot
    max over E scores, K times               sparsemixer (with keepdim), Switch
    topk that keeps all √E keys, then topk   product keys (Doge): in order, so that place is id

Legend: T tokens, K choices per token, E scores a choice is made from, N scores of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from moe_lens.errors import SteeringError, UnsupportedRouter

OWN = -1
"""In place of an expert id: the router decides itself."""

Rechoose = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(scores that the choice is made from `[T, E]`, which experts may be chosen bool `[T, E]`, the
router's own ids `[T, K]`) to the ids to choose in their place `[T, K']`; None: its own."""


@dataclass
class Choice:
    """What one block is to choose in one call, and how far it got.

    Attributes:
        path: The block, for messages.
        ids_TK: int64; `OWN` where the router decides, whole rows or slots. None: `edit` says.
        top_k: K of the router; None: not known before it chose.
        experts: E.
        keys: Keys per half of product keys; None: no product keys.
        source: What the ids are from, for messages.
        complete: No id is `OWN` (known without asking the device).
        edit: Makes the ids of the router's own choice, when it is made; sets `ids_TK`.
        armed: The router is at work: what chooses over E scores is its choice.
        calls: Choices that were forced so far.
    """

    path: str
    ids_TK: Tensor | None
    top_k: int | None
    experts: int
    keys: int | None
    source: str
    complete: bool
    edit: Rechoose | None = None
    armed: bool = False
    calls: int = 0
    unmasked: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Scores before experts were masked out of them, by id of the masked tensor (held, too)."""
    _slots: dict[str, int] = field(default_factory=dict)

    @property
    def over(self) -> int:
        """Scores that the last choice is made from."""
        return self.experts if self.keys is None else self.keys**2

    def slot(self, function: str) -> int:
        """The slot that this call of a one-expert function fills."""
        n = self._slots.get(function, 0)
        self._slots[function] = n + 1
        return n % self._forced().shape[1]

    def _forced(self) -> Tensor:
        assert self.ids_TK is not None
        return self.ids_TK

    def ids_like(self, scores: Tensor) -> Tensor:
        """The forced ids `[…, K]` for scores `[…, N]`, on their device.

        Raises:
            SteeringError: The router sees another number of tokens.
        """
        tokens, ids_TK = scores.numel() // scores.shape[-1], self._forced()
        if tokens != len(ids_TK):
            raise SteeringError(
                f"{self.path} routes {tokens} tokens in this forward, but {self.source} has "
                f"decisions for {len(ids_TK)}. Force the forward that was recorded, on the "
                "same batch."
            )
        return ids_TK.to(scores.device).view(*scores.shape[:-1], ids_TK.shape[1])

    def chooses(self, k: Any, scores: Tensor) -> bool:
        """A choice of k over these scores is the router's."""
        some = k == self.top_k if self.top_k is not None else k < scores.shape[-1]
        return some and scores.shape[-1] == self.over

    @property
    def edits(self) -> bool:
        """The ids are still to be made. Once made they hold: a tap may repeat the arithmetic."""
        return self.edit is not None and self.ids_TK is None

    def edited(self, scores: Tensor, own: Tensor) -> Tensor | None:
        """The ids `[…, K']` that `edit` makes of the own ones; None: leave them.

        Args:
            scores: `[…, E]`.
            own: `[…, K]`.
        """
        assert self.edit is not None
        if self.calls:  # it was left as it is
            return None
        given = scores.detach().reshape(-1, scores.shape[-1])
        # A group limit masks experts out, with a score of zero in some models.
        before = self.unmasked.get(id(scores), (scores,))[0].detach().reshape(given.shape)
        self.calls += 1
        new = self.edit(
            given, (given == before) & (given > -torch.inf), own.reshape(len(given), -1)
        )
        self.ids_TK = new
        return None if new is None else new.view(*scores.shape[:-1], new.shape[1])


class ForcedChoice(TorchFunctionMode):
    """The mode: pushed while a forced block runs, it serves the innermost open `Choice`."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Choice | None] = []
        """Of the running blocks, innermost last; None: the block is left alone."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        replace = _CHOOSERS.get(func)
        choice = self.open[-1] if self.open else None
        if replace is None or choice is None or not choice.armed:
            return func(*args, **kwargs)
        return replace(choice, func, args, kwargs)


def _topk(choice: Choice, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    scores, k, dim, largest = _arguments(args, kwargs, "input", "k", "dim", "largest")
    dim = -1 if dim is None else dim
    if not _last(scores, dim) or largest is False:
        return func(*args, **kwargs)
    if choice.chooses(k, scores):
        return torch.return_types.topk(_whole_choice(choice, scores, func, args, kwargs))
    if choice.keys is not None and k == scores.shape[-1] == choice.keys:
        # Keeps all, chooses nothing. In order, place i of the product is expert i.
        order = torch.arange(k, device=scores.device).expand_as(scores)
        return torch.return_types.topk((scores.clone(), order.contiguous()))
    return func(*args, **kwargs)


def _whole_choice(
    choice: Choice, scores: Tensor, func: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Values and ids of all K choices at once."""
    source = choice.unmasked.get(id(scores), (scores,))[0]
    if choice.edits:
        own = func(*args, **kwargs)
        edited = choice.edited(scores, own[1])
        return tuple(own) if edited is None else (source.gather(-1, edited), edited)
    ids = choice.ids_like(scores)
    choice.calls += 1
    if choice.complete:
        return source.gather(-1, ids), ids
    decides = ids == OWN
    if bool((decides.any(-1) != decides.all(-1)).any()):
        raise SteeringError(
            f"{choice.path} chooses {choice.top_k} experts of a token at once, but {choice.source} "
            f"has decisions for a part of them. Give {choice.top_k} ids, or none (all {OWN})."
        )
    own_values, own_ids = func(*args, **kwargs)
    values = source.gather(-1, ids.clamp_min(0))
    return torch.where(decides, own_values, values), torch.where(decides, own_ids, ids)


def _argmax(choice: Choice, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    scores, dim, keepdim = _arguments(args, kwargs, "input", "dim", "keepdim")
    if dim is None or not _last(scores, dim) or scores.shape[-1] != choice.over:
        return func(*args, **kwargs)
    if choice.edits:
        return _edited_one(choice, scores, func, args, kwargs, keepdim)
    ids = choice.ids_like(scores)[..., choice.slot("argmax")]
    ids = ids.unsqueeze(-1) if keepdim else ids
    choice.calls += 1
    return ids if choice.complete else torch.where(ids == OWN, func(*args, **kwargs), ids)


def _max(choice: Choice, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    scores, dim, keepdim = _arguments(args, kwargs, "input", "dim", "keepdim")
    if not isinstance(dim, int) or not _last(scores, dim) or scores.shape[-1] != choice.over:
        return func(*args, **kwargs)
    if not keepdim and choice.top_k != 1:
        return func(*args, **kwargs)
    if choice.edits:
        own = func(*args, **kwargs)
        ids = _edited_one(choice, scores, torch.argmax, (scores, -1, True), {}, True)
        values = scores.gather(-1, ids)
        chosen = (values, ids) if keepdim else (values[..., 0], ids[..., 0])
        return own if choice.ids_TK is None else torch.return_types.max(chosen)
    ids = choice.ids_like(scores)[..., choice.slot("max")].unsqueeze(-1)
    if not choice.complete:
        ids = torch.where(ids == OWN, scores.argmax(-1, keepdim=True), ids)
    choice.calls += 1
    values = scores.gather(-1, ids)
    return torch.return_types.max((values, ids) if keepdim else (values[..., 0], ids[..., 0]))


def _edited_one(
    choice: Choice,
    scores: Tensor,
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    keepdim: bool | None,
) -> Tensor:
    """The one expert of each token; where several are chosen in turn, no score ranks them all."""
    own: Tensor = func(*args, **kwargs)
    if choice.top_k != 1:
        return own
    edited = choice.edited(scores, own if keepdim else own.unsqueeze(-1))
    if edited is None:
        return own
    if edited.shape[-1] != 1:
        raise UnsupportedRouter(
            f"{choice.path} chooses one expert of a token, and has no place for "
            f"{edited.shape[-1]}: its top-k cannot be changed."
        )
    return edited if keepdim else edited[..., 0]


def _masked_fill(choice: Choice, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A group limit masks experts out by their score; a forced one keeps the score it had."""
    scores, _, _ = _arguments(args, kwargs, "input", "mask", "value")
    masked = func(*args, **kwargs)
    if isinstance(scores, Tensor) and scores.shape == masked.shape:
        choice.unmasked[id(masked)] = (scores, masked)
    return masked


_CHOOSERS: dict[Any, Callable[[Choice, Callable[..., Any], Any, Any], Any]] = {
    torch.topk: _topk,
    torch.Tensor.topk: _topk,
    torch.argmax: _argmax,
    torch.Tensor.argmax: _argmax,
    torch.max: _max,
    torch.Tensor.max: _max,
    torch.masked_fill: _masked_fill,
    torch.Tensor.masked_fill: _masked_fill,
}


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments by name, given by place or by name; None where not given."""
    given = list(args) + [None] * (len(names) - len(args))
    return [kwargs.get(name, value) for name, value in zip(names, given[: len(names)], strict=True)]


def _last(scores: Tensor, dim: int) -> bool:
    return dim in (-1, scores.ndim - 1)


def push(mode: TorchFunctionMode) -> None:
    """Make torch's functions ask the mode first; `remove` ends it."""
    _push_mode(mode)  # type: ignore[no-untyped-call]


def remove(mode: TorchFunctionMode) -> None:
    """Take the mode off torch's stack, wherever it is in it."""
    if not any(m is mode for m in _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        return
    above = []
    while (top := _pop_mode()) is not mode:  # type: ignore[no-untyped-call]
        above.append(top)
    for other in reversed(above):
        push(other)
