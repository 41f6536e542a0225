"""Which layer of a trace is which layer of a model: by path, or in order where paths differ."""

from __future__ import annotations

import warnings

from torch import nn

from moe_lens.errors import SteeringError
from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens_hooks.adapter import MoELayer
from moe_lens_hooks.steering.source import Key


def match(meta: Meta, name: str, layers: list[MoELayer]) -> dict[Key, int]:
    """Number in the trace of each layer of the model, by (path, run in the forward).

    Args:
        meta: Of the trace.
        name: The trace, for messages.
        layers: Of the model, in the order of its modules.

    Raises:
        SteeringError: The layers differ in number, experts or choices per token.
    """
    places = [_place(info) for info in meta.layers]
    paths = list(dict.fromkeys(path for path, _ in places))
    mine = [x for x in layers if not any(_same(x.info.path, p) for p in meta.never_entered)]
    if len(paths) != len(mine):
        missing = [x.info.path for x in mine if not any(_same(x.info.path, p) for p in paths)]
        raise SteeringError(
            f"{name} has {len(paths)} MoE layers, the model {len(mine)}"
            + (f" (not in the trace: {missing[0]})" if missing else "")
            + ". Routing can be forced on the model that was recorded, or on a copy of it."
        )
    layer_of = {p: x for p in paths for x in mine if _same(x.info.path, p)}
    if len({id(x) for x in layer_of.values()}) != len(paths):
        layer_of = dict(zip(paths, mine, strict=True))  # other names: the order has to do
    found: dict[Key, int] = {}
    for info, (path, times) in zip(meta.layers, places, strict=True):
        _agree(info, layer_of[path].info, name)
        found[layer_of[path].info.path, times] = info.layer
    return found


def warn_of_another_class(meta: Meta, name: str, model: nn.Module) -> None:
    """Warn that the model is of another class than the one that was recorded.

    It may well be that one: wrapped, or without its head. What `match` compares is alike.
    """
    mine = type(model).__name__
    if meta.model and meta.model != mine:
        warnings.warn(
            f"{name} was recorded from a {meta.model}, this is a {mine}: its layers are alike, but "
            "is it the same model?",
            stacklevel=3,
        )


def _place(info: LayerInfo) -> Key:
    """A block that runs again in a forward is recorded as `path #1`, `path #2`, …."""
    path, _, times = info.path.partition(" #")
    return path, int(times or 0)


def _same(a: str, b: str) -> bool:
    """One path, or one of them with a wrapper's name in front: `module.layers.0.mlp`."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _agree(recorded: LayerInfo, mine: LayerInfo, name: str) -> None:
    for what, a, b in (
        ("experts", recorded.experts, mine.experts),
        ("zero experts", recorded.zero_experts, mine.zero_experts),
        ("choices per token", recorded.top_k, mine.top_k),
    ):
        if a != b and None not in (a, b):
            raise SteeringError(
                f"{mine.path} has {b} {what}, but {recorded.path} of {name} has {a}. Routing can "
                "be forced on the model that was recorded, or on a copy of it."
            )
