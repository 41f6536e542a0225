"""One recorded forward of a model: what the trace says, beside what its experts were called with.

Legend: T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from support.odd_models import Odd
from support.tables import frame
from torch import Tensor, nn

import moe_lens
from moe_lens.trace.meta import LayerInfo, Meta
from moe_lens.trace.reader import open_run

Slots = list[list[tuple[int, float]]]
"""(id, weight) of the choices that an expert computed, for each token."""


@dataclass
class Recorded:
    """One MoE layer: what the trace says of it, and what its probe was called with."""

    odd: Odd
    info: LayerInfo
    block: Any
    rows: pd.DataFrame
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x_TD(self) -> Tensor:
        """What the experts' tokens are, as the probe got them."""
        x: Tensor = tensors([*self.args, *self.kwargs.values()])[0]
        return x.reshape(-1, x.shape[-1])

    def experts_sum(self) -> Tensor:
        """Run the experts again: `[T, D]`."""
        with torch.no_grad():
            y = self.odd.probe(self.block)(*self.args, **self.kwargs)
            return self.odd.fold(self.block, y, self.x_TD)


def record(
    odd: Odd, model: nn.Module, batch: dict[str, Any], path: Path
) -> tuple[list[Recorded], Meta]:
    """The layers of one recorded forward in the order they ran, and the trace's meta.

    What their experts were called with is seen in a second forward without recording.
    """
    meta, routing, _ = run(model, batch, path)
    calls: dict[str, tuple[Any, Any]] = {}
    handles = []
    for info in meta.layers:

        def keep(m: nn.Module, args: Any, kwargs: Any, at: str = info.path) -> None:
            calls[at] = args, kwargs

        probe = odd.probe(model.get_submodule(info.path))
        handles.append(probe.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [
        Recorded(
            odd,
            info,
            model.get_submodule(info.path),
            routing[routing.layer == info.layer].sort_values("token"),
            *calls[info.path],
        )
        for info in meta.layers
    ], meta


def run(
    model: nn.Module, batch: dict[str, Any], path: Path
) -> tuple[Meta, pd.DataFrame, pd.DataFrame]:
    """Record one forward: the meta, and the tables `routing` and `load`."""
    with (
        torch.no_grad(),
        moe_lens.record(model, path, tokens=1.0, weights="exact") as rec,
        rec.step(),
    ):
        model(**batch)
    return open_run(path).meta, frame(path, "routing"), frame(path, "load")


def slots(rows: pd.DataFrame) -> Slots:
    """What ran of each token's choices."""
    out = []
    for row in rows.itertuples():
        lost = set() if row.dropped is None else set(row.dropped)
        pairs = enumerate(zip(row.expert_ids, row.weights, strict=True))
        out.append([pair for slot, pair in pairs if slot not in lost])
    return out


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def tensors(x: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(x, tuple | list):
        return [t for part in x for t in tensors(part)]
    return [x] if isinstance(x, Tensor) else []
