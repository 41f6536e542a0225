"""`intervene`: what a model's loss becomes when a layer routes otherwise.

Legend: B sequences, S positions, T = B S tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens_hooks.adapter import Adapter
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.finding import find_layers
from moe_lens_hooks.steering import edits
from moe_lens_hooks.steering.change import Base, Change, Layer, change_of, tags_of
from moe_lens_hooks.steering.force import check_forcible
from moe_lens_hooks.steering.looked import Looked
from moe_lens_hooks.steering.passes import Passes, same
from moe_lens_hooks.steering.token_losses import (
    Batch,
    Loss,
    next_token_loss,
    shape_of,
    split_tags,
    take,
)

TOKENS_AT_ONCE = 4096


def intervene(
    model: nn.Module,
    *,
    loss: Loss = next_token_loss,
    tokens_at_once: int = TOKENS_AT_ONCE,
    adapters: Sequence[Adapter] = (),
) -> Interventions:
    """Ask what a model's loss would be if one of its layers routed otherwise.

        with moe_lens.intervene(model) as iv:
            base = iv.measure(tokens)                      # the self-test runs here
            cost = iv.knock_out(1, 3)(base)                # layer 1 without its expert 3
            both = (iv.runner_up(0) + iv.top_k(2, 1))(base)

    Layers after the one that is changed route as they then do; nothing of the model is changed.

    Args:
        model: The model, in the mode in which it is asked; without dropout. Not compiled.
        loss: (model, batch) to the loss of each token `[B, S]` or `[B, S - 1]`, by one call of the
            model. Unsaid: cross entropy of the next token from `logits`.
        tokens_at_once: A larger batch is taken in pieces of whole sequences of so many tokens.
        adapters: Asked before those that come with moe_lens.

    Raises:
        NoMoELayers, UnsupportedRouter: Nothing to change, or a router that cannot be forced.
        SteeringError: The model trains with dropout.
    """
    layers = find_layers([model], [*adapters, *all_adapters()])
    check_forcible(model, layers)
    _refuse_dropout(model)
    if tokens_at_once < 1:
        raise ValueError(f"tokens_at_once={tokens_at_once} must be above 0")
    return Interventions(model, Passes(model, layers, loss), tokens_at_once)


class Interventions:
    """A model whose routing can be changed; what `intervene` returns. Use it in a `with`.

    Its methods but `measure` name a change at a layer (its number in call order, as in traces).
    What they return is called with a measured batch, and gives what the change costs, token by
    token; `+` makes several at once, at other layers.
    """

    def __init__(self, model: nn.Module, passes: Passes, tokens_at_once: int) -> None:
        self._model, self.passes, self.tokens_at_once = model, passes, tokens_at_once

    def __repr__(self) -> str:
        return f"Interventions({type(self._model).__name__}, {len(self.passes.layers)} MoE layers)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing is left to take away: hooks are on the model only while it runs."""

    def measure(self, batch: Batch) -> Base:
        """Run a batch as it is, and twice more: looked at, and forced to what its routers chose.

        Args:
            batch: Token ids `[B, S]`; or a dict of the model's arguments, with under `tags` a tag
                of each sequence.

        Raises:
            UnsupportedRouter: Forcing what was chosen does not reproduce the model's output bit for
                bit: what is found by changing it would not be true.
            SteeringError: The loss is not one a token, or the batch is none.
        """
        _refuse_dropout(self._model)
        inputs, tags = split_tags(batch)
        B, S = shape_of(inputs)
        size = max(1, self.tokens_at_once // S)
        pieces = [torch.arange(at, min(at + size, B)) for at in range(0, B, size)]
        losses, looked = [], []
        for rows in pieces:
            loss, did = self._tested(take(inputs, rows))
            losses.append(loss)
            looked.append(did)
        shapes = [(len(rows), S) for rows in pieces]
        layers = [_layer(n, [of[n] for of in looked], shapes) for n in range(len(looked[0]))]
        return Base(
            torch.cat(losses).numpy(), tags_of(tags, B), layers, len(pieces), inputs, pieces
        )

    def knock_out(self, layer: int, *experts: int, refill: bool = True) -> Intervention:
        """Experts that nobody may choose.

        With `refill`, the router takes its K best of the others (of the same groups, where it
        limits a token to some), and weighs these by its own arithmetic. Without, tokens that chose
        them have fewer experts; where the router makes a token's weights sum to one number, those
        left are scaled up to it, else they stay as they are. A token whose experts are all gone
        then gets nothing from experts.
        """
        if not experts:
            raise ValueError("knock_out(layer, expert, …) needs an expert.")
        if isinstance(experts[0], list | tuple | range | set):
            raise TypeError(
                f"knock_out(layer, expert, …) takes numbers of experts, got {experts[0]!r}: of a "
                "list, knock_out(layer, *experts)."
            )
        numbers = tuple(_number("expert", e) for e in experts)
        return self._one(
            (edits.KnockOut if refill else edits.Drop)(_number("layer", layer), numbers)
        )

    def runner_up(self, layer: int) -> Intervention:
        """Of each token's experts the last gives way to the next one: the K-th to the K+1-th."""
        return self._one(edits.RunnerUp(_number("layer", layer)))

    def top_k(self, layer: int, k: int) -> Intervention:
        """Every token takes its k best experts."""
        if _number("k", k) < 1:
            raise ValueError(f"k={k} must be at least 1")
        return self._one(edits.TopK(_number("layer", layer), _number("k", k)))

    def force_in(self, layer: int, expert: int) -> Intervention:
        """Tokens that did not choose this expert take it in place of their last one."""
        return self._one(edits.ForceIn(_number("layer", layer), _number("expert", expert)))

    def force(self, layer: int, expert_ids: Tensor) -> Intervention:
        """These experts, `[B, S, K]`; tokens whose ids are all -1 follow their router."""
        if expert_ids.ndim != 3 or expert_ids.is_floating_point():
            raise ValueError(
                f"expert_ids is {expert_ids.dtype} {list(expert_ids.shape)}; it must be integers "
                "[B, S, K]"
            )
        partly = (expert_ids == -1).any(-1) & ~(expert_ids == -1).all(-1)
        ordered = expert_ids.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != -1)
        if bool(partly.any()) or bool(twice.any()):
            raise ValueError("expert_ids: a token has K different experts, or -1 in all places.")
        return self._one(edits.Force(_number("layer", layer), expert_ids))

    def random(self, layer: int, *, seed: int = 0) -> Intervention:
        """As many experts for each token, drawn alike, never all those that its router chose."""
        return self._one(edits.Random(_number("layer", layer), seed))

    def duplicate(self, layer: int, expert: int, *, over: int) -> Intervention:
        """`over` becomes a copy of `expert`: what it costs tells how alike the two are."""
        experts = _number("expert", expert), _number("over", over)
        return self._one(edits.Duplicate(_number("layer", layer), *experts))

    def _one(self, edit: edits.Edit) -> Intervention:
        return Intervention(self, (edit,))

    def _tested(self, batch: Batch) -> tuple[Tensor, list[Looked]]:
        """Losses, and what each layer did, once forcing that has reproduced the forward."""
        loss, outputs = self.passes.free(batch)
        looked_loss, looked_outputs, layers = self.passes.looked(batch)
        forced_loss, forced_outputs = self.passes.repeated(batch, layers)
        for what, again, found in (
            ("looking at its routers", looked_loss, looked_outputs),
            ("forcing it to what it chose", forced_loss, forced_outputs),
        ):
            if not same([loss, *outputs], [again, *found]):
                raise UnsupportedRouter(
                    f"{type(self._model).__name__}: {what} does not reproduce its output bit for "
                    "bit, so that changes cannot be told from noise. Does it draw at random, or "
                    "keep a state from one forward to the next? Call model.eval()."
                )
        return loss, layers


@dataclass(frozen=True)
class Intervention:
    """One or several changes; called with a measured batch, it tells what they cost."""

    session: Interventions = field(repr=False)
    edits: tuple[edits.Edit, ...]

    def __add__(self, other: Intervention) -> Intervention:
        return replace(self, edits=(*self.edits, *other.edits))

    def __call__(self, base: Base) -> Change:
        """Run the batch with the changes.

        Raises:
            UnsupportedRouter: A layer's choice cannot be changed.
            SteeringError: There is no such layer or expert, or the change leaves too few experts.
            TypeError: `base` is a batch that was not measured.
        """
        if not isinstance(base, Base):
            raise TypeError(
                f"an intervention is called with a measured batch, got {type(base).__name__}: "
                "base = iv.measure(batch), then iv.knock_out(0, 3)(base)."
            )
        for edit in self.edits:
            check_edit(edit, base)
        numbers = [edit.layer for edit in self.edits]
        if twice := {n for n in numbers if numbers.count(n) > 1}:
            raise SteeringError(
                f"layer {min(twice)} has two changes at once; knock_out takes several experts."
            )
        loss_BS = np.empty_like(base.loss_BS)
        affected_BS = np.zeros(base.loss_BS.shape, bool)
        for rows in base.pieces:
            here = [e.at(rows) if isinstance(e, edits.Choosing) else e for e in self.edits]
            loss, affected_T = self.session.passes.changed(take(base.inputs, rows), here)
            loss_BS[rows] = loss.numpy()
            affected_BS[rows] = affected_T.view(len(rows), -1).numpy()
        return change_of(base, loss_BS, affected_BS)


def _number(what: str, x: int) -> int:
    """As a plain integer; numpy's and torch's will do."""
    try:
        return index(x)
    except TypeError as e:
        raise TypeError(f"{what}={x!r} must be a whole number") from e


def check_edit(edit: edits.Edit, base: Base) -> None:
    """Raise what can be known before a forward.

    Raises:
        UnsupportedRouter, SteeringError: As `Intervention` says.
    """
    n = edit.layer
    if not 0 <= n < len(base.layers):
        raise SteeringError(f"there is no layer {n}: the model has {len(base.layers)} MoE layers.")
    layer = base.layers[n]
    if layer.why_not is not None and isinstance(edit, edits.Choosing):
        raise UnsupportedRouter(layer.why_not)
    if not layer.aligned:
        raise UnsupportedRouter(
            f"layer {n} ({layer.info.path}) does not route the {base.loss_BS.shape[0]} x "
            f"{base.loss_BS.shape[1]} tokens that the losses are of."
        )
    experts = layer.info.experts + layer.info.zero_experts
    named = [getattr(edit, name, ()) for name in ("experts", "expert", "over")]
    for expert in (e for x in named for e in (x if isinstance(x, tuple) else (x,))):
        if not 0 <= expert < experts:
            raise SteeringError(f"layer {n} has experts 0 to {experts - 1}, not {expert}.")
    if isinstance(edit, edits.Force):
        ids = edit.ids_BSK
        if tuple(ids.shape) != layer.expert_ids_BSK.shape or int(ids.max()) >= experts:
            raise SteeringError(
                f"expert_ids {list(ids.shape)} up to {int(ids.max())}, but layer {n} chooses "
                f"{list(layer.expert_ids_BSK.shape)} of {experts} experts."
            )
    if isinstance(edit, edits.TopK) and edit.k > experts:
        raise SteeringError(f"layer {n} has {experts} experts: its top-k cannot be {edit.k}.")


def _layer(number: int, parts: list[Looked], shapes: list[tuple[int, int]]) -> Layer:
    """What a layer did, over all pieces of a batch."""
    first = parts[0]
    info = replace(first.layer.info, layer=number)
    aligned = all(
        p.whole and len(p.ids_TK) == B * S for p, (B, S) in zip(parts, shapes, strict=True)
    )
    aligned = aligned and info.stream == "main" and first.layer.layout != "sb"
    S = shapes[0][1]

    def joined(tensors: list[Tensor]) -> NDArray[np.float64]:
        array: NDArray[np.float64] = torch.cat(tensors).numpy()
        return array.reshape(-1, S, *array.shape[1:]) if aligned else array[:0]

    why_not = None
    if not all(p.ranked for p in parts):
        why_not = (
            f"layer {number} ({info.path}, adapter {info.adapter}) does not choose from the scores "
            "of all experts at once by torch.topk (or argmax or max, of one expert), so that its "
            "choice cannot be changed."
        )
    return Layer(
        info,
        joined([p.ids_TK for p in parts]).astype(np.int64),
        joined([p.margin_T for p in parts]),
        joined([p.entropy_T for p in parts]),
        why_not,
    )


def _refuse_dropout(model: nn.Module) -> None:
    """Raise if the model draws at random: what changes could not be told from noise.

    Raises:
        SteeringError: It trains, with dropout.
    """
    for path, module in model.named_modules():
        if not module.training:
            continue
        names = [n for n in vars(module) if "dropout" in n.lower()]
        names += ["p"] if "Dropout" in type(module).__name__ else []
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                raise SteeringError(
                    f"{path or type(model).__name__} is training with {name}={value:g}, which "
                    "draws anew in every forward: call model.eval()."
                )
