"""One layer in one forward, measured beside its twins.

The routing, the balanced twin, the twin that touches the same experts, and the routing once more
(A/A) are run in turn, repeat by repeat, so that what disturbs one disturbs all. What the first and
the last differ by is what this machine cannot tell apart.

T tokens, K choices of a token, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.replay import floors, twins
from moe_lens.replay.floors import Ceiling, Shape
from moe_lens.replay.policies import Work
from moe_lens.replay.routing import Floats, Ids, Routed
from moe_lens.runtime.gemm import grouped
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.timing import interleaved, noise_floor

Row = dict[str, Any]
"""A row of `moe_lens.trace.schema.REPLAY`, by column."""


def measured(
    layer: MoELayer,
    x_TD: Tensor,
    routed: Routed,
    work: Work,
    shape: Shape,
    ceiling: Ceiling,
    *,
    repeats: int,
    stages: bool = False,
) -> Row:
    """Measure one forward.

    Args:
        layer: Of the shape.
        x_TD: Its tokens.
        routed: What was recorded.
        work: What of it experts compute.
        shape: Of the layer.
        ceiling: Of the machine.
        repeats: How often; the median counts.
        stages: Measure the stages too.
    """
    ids_TK = work.expert_ids_TK
    ids = {
        "time": ids_TK,
        "balanced": twins.balanced(ids_TK, layer.experts),
        "same_touched": twins.same_touched(ids_TK),
        "again": ids_TK,
    }
    works = {name: call(layer, x_TD, of, work.weights_TK) for name, of in ids.items()}
    graphs = in_graphs(layer, ids_TK.size)
    seconds = interleaved(works, repeats, layer.device, graphs=graphs)
    taken = {name: 1e9 * median(rounds) for name, rounds in seconds.items()}
    parts: dict[str, float] = {}
    if stages:
        weights_TK = torch.from_numpy(work.weights_TK).to(layer.device)
        own = layer.parts(x_TD, torch.from_numpy(ids_TK).to(layer.device), weights_TK)
        alone = interleaved(own, repeats, layer.device, graphs=graphs)
        parts = {name: 1e9 * median(rounds) for name, rounds in alone.items()}
    gathers = layer.backend_for(ids_TK.size).product == "triton"
    counted = counts(routed, work, shape, ceiling, gathers=gathers)
    noise = taken["time"] * noise_floor(seconds["time"], seconds["again"])
    if (
        counted["touched"] == shape.experts
    ):  # both twins are the same work: a second sample of noise
        noise = max(noise, abs(taken["balanced"] - taken["same_touched"]))
    return {
        **counted,
        "time_ns": taken["time"],
        "again_ns": taken["again"],
        "noise_ns": noise,
        "balanced_ns": taken["balanced"],
        "same_touched_ns": taken["same_touched"],
        **{f"{name}_ns": parts.get(name) for name in floors.STAGES},
    }


def call(
    layer: MoELayer, x_TD: Tensor, expert_ids_TK: Ids, weights_TK: Floats
) -> Callable[[], object]:
    """The layer at work on these choices."""
    ids_TK = torch.from_numpy(expert_ids_TK).to(layer.device)
    gates_TK = torch.from_numpy(weights_TK).to(layer.device)
    rows_E = rows_by_expert(expert_ids_TK, layer.experts).tolist()

    def run() -> object:
        layer.expect(rows_E)  # the host's choice of tiles: no part of a captured graph
        return layer(x_TD, ids_TK, gates_TK)

    return run


def in_graphs(layer: MoELayer, slots: int) -> bool:
    """Whether a batch is timed as a CUDA graph: the backend must not wait for the device."""
    product = layer.backend_for(slots).product
    if product == "grouped_mm":
        return grouped.is_fast(torch.cuda.get_device_capability(layer.device), layer.dtype)
    return product == "triton"


def counts(
    routed: Routed, work: Work, shape: Shape, ceiling: Ceiling, *, gathers: bool = False
) -> Row:
    """What can be said of a forward without running it: its place, its rows and its floors.

    `gathers`: as `floors.stages` takes it.
    """
    rows_E = rows_by_expert(work.expert_ids_TK, shape.experts)
    touched = rows_E[rows_E > 0]
    tokens, rows = len(work.expert_ids_TK), int(rows_E.sum())
    least = floors.fused(tokens, rows, len(touched), shape)
    of_stages = floors.stages(tokens, rows, len(touched), shape, gathers=gathers)
    return {
        "rank": routed.rank,
        "layer": routed.layer,
        "step": routed.step,
        "forward": routed.forward,
        "phase": routed.phase,
        "tokens": tokens,
        "slots": work.slots,
        "dropped": work.dropped,
        "rerouted": work.rerouted,
        "touched": len(touched),
        "rows_min": int(touched.min(initial=rows)),
        "rows_median": float(np.median(touched)) if len(touched) else 0.0,
        "rows_max": int(touched.max(initial=0)),
        "padded_rows": floors.padded_rows(rows_E.tolist()),
        "floor_ns": least.floor_ns(ceiling),
        "flop": least.flop,
        "bytes": least.bytes,
        **{f"{n}_floor_ns": stage.floor_ns(ceiling) for n, stage in of_stages.items()},
    }


def rows_by_expert(expert_ids_TK: Ids, experts: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of each expert, [E]."""
    return np.bincount(expert_ids_TK[expert_ids_TK >= 0], minlength=experts)
