"""The MoE layers of a model: every module is offered to the adapters in turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from moe_lens.errors import NoMoELayers, UnsupportedRouter
from moe_lens_hooks.adapter import Adapter, MoELayer
from moe_lens_hooks.adapters.fallback import undescribed
from moe_lens_hooks.staging import refuse_devices

DATA_PARALLEL = (
    "torch.nn.DataParallel runs copies of the model in threads, each with a part of the batch, "
    "which cannot be told apart. Record under torch.nn.parallel.DistributedDataParallel, a process "
    "for each device."
)

_MTP = re.compile(r"(^|_)mtp(_|$)|multi_token_prediction", re.IGNORECASE)
_SOFT = re.compile(r"soft_?(moe|mixture)", re.IGNORECASE)


def find_layers(models: Sequence[nn.Module], adapters: Sequence[Adapter]) -> list[MoELayer]:
    """The MoE layers of a model; a module that one adapter took is not offered to the next.

    Args:
        models: The model, or its pipeline chunks: then their numbers lead the paths of the layers.
        adapters: Asked in this order.

    Raises:
        NoMoELayers: None was recognised.
        UnsupportedRouter: A block is an MoE whose routing cannot be seen, or on such a device.
    """
    refuse_devices(models)
    if any(isinstance(m, nn.DataParallel) for model in models for m in model.modules()):
        raise UnsupportedRouter(DATA_PARALLEL)
    found: list[MoELayer] = []
    for path, module in named_modules(models):
        if _SOFT.search(type(module).__name__):
            raise UnsupportedRouter(
                f"{path} ({type(module).__name__}) is a soft mixture: each expert computes a blend "
                "of all tokens, so there is no routing decision to record."
            )
        layers = (adapter.layer(path, module) for adapter in adapters)
        layer = next((x for x in layers if x is not None), None)
        if layer is not None:
            if layer.info.role == "mlp" and (depth := _mtp_depth(path)) is not None:
                layer.info = replace(layer.info, role="mtp", stream=f"mtp{depth}")
            if layer.info.contradiction is not None:
                raise UnsupportedRouter(
                    f"{path} ({type(module).__name__}): {layer.info.contradiction}. Correct what "
                    f"the adapter {layer.info.adapter or '(unnamed)'} says in its LayerInfo."
                )
            found.append(layer)
    found += list(undescribed(named_modules(models), found))
    if not found:
        names = ", ".join(a.name for a in adapters)
        raise NoMoELayers(
            f"{type(models[0]).__name__} has no MoE layer that an adapter recognises ({names}). "
            "If it is dense there is nothing to record; if it routes, write an adapter in 30 lines "
            "(docs/hooks.md), or record(None, …) and hand the routing to rec.log(layer, "
            "expert_ids, weights)."
        )
    return found


def _mtp_depth(path: str) -> int | None:
    """Which multi-token-prediction head a module is in, from 0; None: it is in none.

    Each head has a stream of its own: it sees fewer tokens than the one before.
    """
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if _MTP.search(part)), None)
    if at is None:
        return None
    numbers = (int(p) for p in (*parts[at:], *parts[:at]) if p.isdigit())
    return next(numbers, 0)


def edited(
    models: Sequence[nn.Module], layers: Sequence[MoELayer], adapters: Sequence[Adapter]
) -> list[str]:
    """What of a model was changed since its layers were found: what hooks did not see.

    Args:
        models: As in `find_layers`.
        layers: Those that were found.
        adapters: As in `find_layers`.
    """
    there = {m for _, m in named_modules(models)}
    texts = []
    for x in layers:
        gone = [t.module for t in x.taps if t.module not in there and t.module is not x.block]
        if x.block not in there:
            texts.append(f"the MoE block {x.info.path} was taken out of the model")
        elif gone:
            texts.append(f"{type(gone[0]).__name__} in the MoE block {x.info.path} was replaced")
    try:
        now = find_layers(models, adapters) if models else []
    except UnsupportedRouter as e:
        now, texts = [], texts or [f"the model has another MoE block than at first: {e}"]
    known = {x.block for x in layers}
    texts += [f"the MoE block {x.info.path} was put in" for x in now if x.block not in known]
    return [
        f"{text} while the model was recorded: from then on the trace lacks it, in part or whole. "
        "Edit first, then record; or record again into a new folder"
        for text in texts
    ]


def named_modules(models: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model by its path, led by the number of its chunk if there are several."""
    if len(models) == 1:
        yield from models[0].named_modules()
        return
    for i, model in enumerate(models):
        yield from model.named_modules(prefix=str(i))
