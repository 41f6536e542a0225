"""How often each expert was chosen, over what was asked for: what placements of engines start from.

`routed` of the table `load`: the router's choices by valid tokens, whether or not a capacity let
them through; padding is in none. Choices of experts that compute nothing are left out.

L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from moe_lens.errors import ExportRefused
from moe_lens.exporters.selection import Selection, layers_of
from moe_lens.replay import tables
from moe_lens.trace.meta import LayerInfo
from moe_lens.trace.reader import RunFiles


@dataclass(frozen=True)
class Counts:
    """Choices of each expert.

    Attributes:
        infos: The L layers.
        chosen_LE: int64.
    """

    infos: list[LayerInfo]
    chosen_LE: NDArray[np.int64]


def counts_of(files: RunFiles, selection: Selection) -> Counts:
    """Sum them up. Steps are told by the first forward of a window (small forwards share one).

    Raises:
        ExportRefused: Nothing was asked for that is there, or layers differ in their experts.
        TraceError: A segment cannot be read.
    """
    infos = layers_of(files, selection)
    sizes = {info.experts for info in infos}
    if len(sizes) > 1:
        raise ExportRefused(
            f"{files.path}: layers differ in their number of experts ({sorted(sizes)}), and an "
            "array has one width: export those of one number at a time, with --layers."
        )
    experts = sizes.pop()
    layers = [info.layer for info in infos]
    row_of = np.full(max(layers) + 1, -1)
    row_of[layers] = np.arange(len(layers))
    only = selection.rows() & pc.field("layer").isin(layers)
    if selection.tag is not None:
        only &= pc.field("tag") == selection.tag
    flat = np.zeros(len(layers) * experts, np.int64)
    for rank in tables.ranks(files):
        for batch in tables.batches(files, "load", rank, ("layer", "expert", "routed"), only):
            layer, expert, routed = (column.to_numpy() for column in batch.columns)
            kept = expert < experts
            at = row_of[layer[kept]] * experts + expert[kept]
            np.add.at(flat, at, routed[kept])
    if not flat.any():
        raise ExportRefused(f"{files.path} has no choices{selection.said(files)}.")
    return Counts(infos, flat.reshape(len(layers), experts))
