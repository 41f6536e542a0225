"""SGLang's expert distribution recorder in its modes stat and stat_approx: counts of passes.

Written by `_StatAccumulator.dump` (sglang 0.5.23, srt/eplb/expert_distribution.py, line 985),
summed over all ranks:

    rank: 0
    logical_count: int32 [N passes, B decoder blocks, E logical experts]
    average_utilization_rate_over_window: float or None

The N passes are a circular buffer (1000 by default): rows that no pass filled are zeros, and a new
recording begins where the one before stopped, for a dump empties the buffer but does not rewind it
(`_CircularBuffer.reset`, line 1074).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_lens.errors import ImportRefused
from moe_lens.importers.formats._sglang_layers import layers_of
from moe_lens.importers.formats._torch_file import as_array, shown
from moe_lens.importers.source import UNKNOWN_PHASE, Counted, Given, Ints, Item, Rank, Source

_LACKS = {
    "weights": "SGLang's recorder stores no gate weights",
    "entropy": "SGLang's recorder stores no logits",
    "tokens": "mode stat stores counts of experts in a pass, not its tokens",
    "sequences": "mode stat stores counts of experts in a pass, not its sequences",
    "phases": "mode stat does not say which passes are prefill and which decode",
    "times": "SGLang's recorder stores no times",
    "ranks": "counts are sums over all ranks, in which tokens that several ranks of tensor "
    "parallelism saw count as often",
}
_IN_ORDER = (
    "passes are numbered as they lie in the recorder's buffer; SGLang's own numbers are lost"
)
_ONE_GAP = (
    "passes are numbered from the end of the buffer's empty part on, where it began; SGLang's own "
    "numbers are lost"
)
_FULL = (
    "the recorder's circular buffer is full: older passes are overwritten, and where it begins is "
    "not known: some pass may follow a later one"
)
_HOLES = (
    "the recorder's circular buffer has several empty parts: where it begins is not known, and "
    "some pass may follow a later one"
)


def open_stat(files: list[tuple[Path, dict[str, Any]]], given: Given) -> Source:
    """Open the dump of mode stat or stat_approx.

    Args:
        files: Paths and what was loaded. Ranks that share all experts each write the same.
        given: What the file does not say: `top_k`.

    Raises:
        ImportRefused: It is not as SGLang writes it, nothing was recorded, or several dumps differ.
    """
    path, found = files[0]
    count_NBE = _counts(path, found)
    for other, also in files[1:]:
        if not np.array_equal(count_NBE, _counts(other, also)):
            raise ImportRefused(
                f"{other} and {path.name} are two dumps: import them one at a time."
            )
    filled_N = count_NBE.any(axis=(1, 2))
    if not filled_N.any():
        raise ImportRefused(
            f"{path}: all counts are zero: nothing ran between start and dump, or this backend "
            "does not count (try mode stat, if this is stat_approx)."
        )
    order, why = _order(filled_N)
    blocks, layers, notes = layers_of(
        np.asarray(count_NBE.any(axis=(0, 2))), count_NBE.shape[2], given, path
    )
    if len(files) > 1:
        notes[f"files that say the same as {path.name}: left out"] = len(files) - 1

    def items() -> Iterator[Item]:
        for step, row in enumerate(order):
            count_BE: Ints = count_NBE[row]
            by_layer = {i: count_BE[b] for i, b in enumerate(blocks)}
            yield Counted(f"row {row}", step, 0, UNKNOWN_PHASE, by_layer)

    return Source(
        layers=layers,
        ranks=[Rank(0, items, path)],
        lacks=_LACKS | {"steps": why},
        model=given.model or "",
        notes=notes,
    )


def _counts(path: Path, found: dict[str, Any]) -> Ints:
    count_NBE = as_array(found["logical_count"], 3, f"{path}: logical_count")
    if not count_NBE.size:
        raise ImportRefused(f"{path}: logical_count is empty: {list(count_NBE.shape)}.")
    if count_NBE.min() < 0:
        n, b, e = (int(x) for x in np.argwhere(count_NBE < 0)[0])
        raise ImportRefused(
            f"{path}: row {n}, block {b}, expert {e}: a count is {int(count_NBE[n, b, e])}."
        )
    rank = found.get("rank")
    if not isinstance(rank, int) or rank != 0:
        raise ImportRefused(f"{path}: the rank is {shown(rank)}; only rank 0 writes.")
    return count_NBE


def _order(filled_N: Any) -> tuple[list[int], str]:
    """Rows of the buffer in the order in which they were filled, and what is not known of it."""
    N = len(filled_N)
    rows: list[int] = np.flatnonzero(filled_N).tolist()
    if filled_N.all():
        return rows, _FULL
    # Filled rows whose row before, around the corner, is empty.
    begins = [r for r in rows if not filled_N[r - 1]]
    if len(begins) > 1:
        return rows, _HOLES
    turned = [(begins[0] + i) % N for i in range(len(rows))]
    return turned, _IN_ORDER if begins[0] == 0 else _ONE_GAP
