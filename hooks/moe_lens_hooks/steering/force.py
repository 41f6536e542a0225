"""`force_routing`: reads where the decisions are, checks that they fit, and attaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from moe_lens.errors import SteeringError, UnsupportedRouter
from moe_lens.trace.layout import ranks
from moe_lens_hooks.adapter import Adapter, MoELayer
from moe_lens_hooks.adapters import all_adapters
from moe_lens_hooks.finding import find_layers
from moe_lens_hooks.opening import rank_and_world
from moe_lens_hooks.steering.forced import Forced
from moe_lens_hooks.steering.forwards import ByForward
from moe_lens_hooks.steering.given import ByLayer, Given
from moe_lens_hooks.steering.matching import match
from moe_lens_hooks.steering.positions import ByPosition
from moe_lens_hooks.steering.recorded import Recorded, came_from, read
from moe_lens_hooks.steering.source import Key, Source, check_ids

_NO_CHOICE = {
    "expert-choice": "its experts choose tokens, so a token has no decision of its own",
    "dynamic-k": "it chooses another number of experts for each token",
}


def force_routing(
    model: nn.Module,
    source: str | Path | ByLayer,
    *,
    weights: Literal["router", "recorded"] | ByLayer = "router",
    by: Literal["forward", "position"] = "forward",
    sequences: Sequence[int | str] | None = None,
    steps: int | range | None = None,
    rank: int | None = None,
    partial: bool = False,
    allow_rounded: bool = False,
    layout: Literal["bs", "sb"] | None = None,
    adapters: Sequence[Adapter] = (),
) -> Forced:
    """Make a model route as it is told, until the returned context ends.

    With `weights="router"` the choice is forced inside the router: its own weighting runs on the
    forced experts, and gradients flow into it (rollout routing replay). With `"recorded"` the
    experts are given ids and weights as they were recorded, and the router learns nothing.

    Every forward is checked: the experts got exactly what was forced, or it raises.

    Args:
        model: The module whose forwards are to be forced. Not compiled.
        source: Folder of a trace with per-token rows; or expert ids, for every forward: `[L, T, K]`
            or `[L, B, S, K]`, or a dict of layer (number in call order, or path of the block) to
            `[T, K]` or `[B, S, K]`, which leaves other layers alone. Tokens whose ids are all -1
            follow their router.
        weights: "router", "recorded", or weights in the form of the ids.
        by: How a trace is aligned. "forward": the n-th forward is the n-th recorded one, token by
            token. "position": each token by its sequence and position in it, so that what was
            recorded in prefill and decode is replayed in batches of whole sequences; tokens
            without a decision (the last one generated) follow their router, and are counted.
        sequences: By position: the recorded sequences of each batch, as `Forced.rows` says.
        steps: Only these steps of the trace: one, or a range.
        rank: Only what this rank recorded. Unsaid: by position all ranks, by forward the only one
            or that of this process.
        partial: By position: batches may be parts of the recorded sequences, or go beyond them.
        allow_rounded: With `weights="recorded"`: take weights that the trace keeps rounded to bf16.
        layout: How the model flattens `[B, S]` tokens: "bs", or "sb" as Megatron does; unsaid: as
            its library does.
        adapters: Asked before those that come with moe_lens.

    Raises:
        NoMoELayers, UnsupportedRouter: Nothing to force, or a router that cannot be forced.
        TraceError: The source is not a trace.
        SteeringError: The decisions do not fit the model; raised in a forward where they do not fit
            the batch.
        ValueError: An argument is not one of those above.
    """
    for name, value, allowed in (
        ("by", by, ("forward", "position")),
        ("layout", layout, ("bs", "sb")),
        ("weights", weights, ("router", "recorded")),
    ):
        if isinstance(value, str) and value not in allowed:
            raise ValueError(f'{name}={value!r} must be "{allowed[0]}" or "{allowed[1]}"')
    layers = find_layers([model], [*adapters, *all_adapters()])
    check_forcible(model, layers)
    if not isinstance(source, str | Path):
        if weights == "recorded":
            raise ValueError('weights="recorded" needs a trace; give the weights themselves.')
        given_weights = None if isinstance(weights, str) else weights
        ids = Given(source, given_weights, layers)
        return Forced(model, layers, ids, given_weights is not None)
    if not isinstance(weights, str):
        raise ValueError('weights of a trace are "router" or "recorded".')
    recorded = read(
        source, ranks=_ranks(source, rank, by), steps=_range(steps), weights=weights == "recorded"
    )
    if recorded.meta.imported and not len(recorded.tokens["at"]):
        raise SteeringError(
            f"{source} does not say whose tokens its choices are: "
            f"{came_from(recorded.meta, 'sequences')}."
        )
    if weights == "recorded" and recorded.meta.weights == "none":
        raise SteeringError(
            f"{source} holds no gate weights: {came_from(recorded.meta, 'weights')}. Force its "
            'choices with weights="router".'
        )
    if weights == "recorded" and recorded.meta.weights != "exact" and not allow_rounded:
        raise SteeringError(
            f"{source} keeps gate weights rounded to bf16, which the experts did not get. Record "
            'with record(..., weights="exact"), or accept the rounding with allow_rounded=True.'
        )
    numbers = match(recorded.meta, recorded.name, layers)
    found: Source
    if by == "forward":
        if recorded.meta.steps:
            raise SteeringError(
                f"{source} has forwards that no engine ran ({recorded.meta.steps}), which are not "
                'those of the model: force by="position".'
            )
        if sequences is not None:
            raise ValueError('sequences= is for by="position".')
        found = ByForward(recorded, numbers)
    else:
        library = next((x.layout for x in layers if x.layout), "bs")
        found = ByPosition(recorded, numbers, layout or library, partial)
    _fits(recorded, numbers, layers)
    handle = Forced(model, layers, found, weights == "recorded")
    if sequences is not None:
        try:
            handle.rows(list(sequences))
        except SteeringError:
            handle.close()
            raise
    return handle


def check_forcible(model: nn.Module, layers: list[MoELayer]) -> None:
    """Raise what can be known before a forward.

    Raises:
        UnsupportedRouter: Compiled code, or a router whose choices are no fixed number per token.
    """
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UnsupportedRouter(
                f"{path or type(model).__name__} is compiled: routing is forced in Python, between "
                "the functions of torch. Force the model as it was before torch.compile."
            )
    for layer in layers:
        if why := _NO_CHOICE.get(layer.info.router):
            raise UnsupportedRouter(
                f"{layer.info.path} ({type(layer.block).__name__}) cannot be forced: {why}."
            )


def _ranks(source: str | Path, rank: int | None, by: str) -> list[int] | None:
    """Ranks to read; None: all."""
    if rank is not None:
        return [rank]
    there = ranks(Path(source))
    if by == "position" or len(there) < 2:
        return None
    own, _ = rank_and_world()
    if own not in there:
        raise SteeringError(
            f"{source} has ranks {', '.join(map(str, there))}: say whose forwards with rank=."
        )
    return [own]


def _range(steps: int | range | None) -> range | None:
    if isinstance(steps, int):
        return range(steps, steps + 1)
    if steps is not None and steps.step != 1:
        raise ValueError(f"steps={steps} must be a range without gaps")
    return steps


def _fits(recorded: Recorded, numbers: dict[Key, int], layers: list[MoELayer]) -> None:
    """The recorded ids are ids of the model's experts."""
    by_path = {x.info.path: x for x in layers}
    for (path, _), number in numbers.items():
        ids = torch.from_numpy(recorded.layers[number].ids_NK)
        check_ids(ids, by_path[path], f"{recorded.name}, layer {number}")
