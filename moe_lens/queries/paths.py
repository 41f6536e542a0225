"""`paths`: which experts tokens go through, from the first MoE layer of a stream to the last."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import pandas as pd

from moe_lens.metrics.paths import Paths
from moe_lens.metrics.paths import paths as of_ids
from moe_lens.queries import along
from moe_lens.queries.evidence import BLOCK, FEWEST, MOST, TOKENS
from moe_lens.queries.memory import is_chosen_by_token
from moe_lens.queries.session import Trace, one_run

if TYPE_CHECKING:
    from moe_lens.trace.meta import LayerInfo


def paths(
    trace: Trace, phase: str | None = None, layers: Collection[int] | None = None
) -> dict[str, Paths]:
    """The paths of tokens of whole sequences, beside chance.

    Args:
        trace: One run.
        phase: Only this one; None: all together.
        layers: Only through these; None: all. Layers whose experts choose tokens are left out.

    Returns:
        By stream (main, encoder, decoder); without those of fewer than two layers, of fewer than
        two tokens with rows in all of them, and without gate weights, which tell first choices.

    Raises:
        QueryError: The trace has several runs.
    """
    run = one_run(trace)
    streams: dict[str, list[LayerInfo]] = {}
    for info in run.layers if run.token_rows else ():
        if is_chosen_by_token(info) and (layers is None or info.layer in layers):
            streams.setdefault(info.stream, []).append(info)
    found = {}
    for stream, infos in streams.items():
        if len(infos) > 1:
            firsts = _firsts(trace, phase, infos)
            if firsts is not None and len(firsts) > 1:
                found[stream] = of_ids(firsts.to_numpy().T)
    return found


def _firsts(trace: Trace, phase: str | None, infos: list[LayerInfo]) -> pd.DataFrame | None:
    """A row a token that has rows in all these layers, a column a layer: its first choice.

    None where nothing tells which that is.
    """
    most = min(max(TOKENS // len(infos), FEWEST), MOST)
    columns = []
    for begin in range(0, len(infos), BLOCK):
        block = infos[begin : begin + BLOCK]
        rows = trace.query(
            "sequence_choices", phase=phase, first_layer=block[0].layer,
            last_layer=block[-1].layer, most=most,
        ).df()  # fmt: skip
        for info in block:
            of_layer = rows[rows["layer"] == info.layer]
            if not along.ranked(of_layer):
                return None
            ids_NK, _ = along.choices(of_layer, info.experts)
            first = ids_NK[:, 0] if ids_NK.shape[1] else -1
            columns.append(pd.Series(first, of_layer["nth"], "int64", str(info.layer)))
    return pd.concat(columns, axis=1, join="inner")
