"""What one expert takes for n rows, and how a layer's time is attributed to experts by it.

A kernel runs all experts at once, so nobody can see the time of one. What can be measured is the
matrix products of a layer of which one expert has n rows and the others none; less what they take
without any row. By this curve a layer's time is attributed: an expert's share is its t(n) over the
sum of all experts'. How far such a sum is from the time of a layer that was measured in the same
turns is printed with it.

E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_lens.replay.measure import in_graphs
from moe_lens.runtime.layer import MoELayer
from moe_lens.runtime.timing import interleaved

_SAME_DIGITS = 9
"""Shares that are equal to so many decimals are equal."""

_PRODUCTS = ("gate_up", "act", "down")
_ROTATED = 4
"""Experts that take turns within a point of the curve, so that a cache does not keep the one."""


@dataclass(frozen=True)
class Curve:
    """Time of one expert, ns, for these rows.

    Attributes:
        rows: Where it was measured.
        ns: What it took there.
        base_ns: What the products take without any row.
        layer_ns: What a layer took that was measured in the same turns.
        sum_ns: What the curve makes of that layer: the sum over its experts.
    """

    rows: list[int]
    ns: list[float]
    base_ns: float
    layer_ns: float = 0.0
    sum_ns: float = 0.0

    def at(self, rows_E: NDArray[np.int64]) -> NDArray[np.float64]:
        """Time of experts with these rows, ns: linear between points, and beyond the last."""
        rows, ns = [0, *self.rows], [0.0, *self.ns]
        times: NDArray[np.float64] = np.interp(rows_E, rows, ns)
        slope = (ns[-1] - ns[-2]) / (rows[-1] - rows[-2])
        return times + slope * np.maximum(rows_E - rows[-1], 0)


@dataclass
class Attributed:
    """Time attributed to the experts of a layer in a phase.

    Attributes:
        rows_E: Rows that each expert had.
        curve_ns_E: By the curve, ns.
        time_ns: What the layer took, ns.
    """

    rows_E: NDArray[np.int64]
    curve_ns_E: NDArray[np.float64]
    time_ns: float = 0.0

    def add(self, rows_E: NDArray[np.int64], curve: Curve, time_ns: float) -> None:
        """Add a forward."""
        self.rows_E += rows_E
        self.curve_ns_E += curve.at(rows_E)
        self.time_ns += time_ns

    def hottest(self, most: int) -> list[dict[str, Any]]:
        """The experts with the largest shares: expert, rows, share, alike, attributed ns.

        `alike` counts the other experts of the layer with that share, listed or not. Among equals
        the lower id comes first.
        """
        total = float(self.curve_ns_E.sum())
        if total <= 0:
            return []
        # Sums of floats in another order differ in their last digits, which is no difference.
        share_E = (self.curve_ns_E / total).round(_SAME_DIGITS)
        order = np.argsort(-share_E, kind="stable")[:most]
        return [
            {
                "expert": int(e),
                "rows": int(self.rows_E[e]),
                "share": float(share_E[e]),
                "alike": int((share_E == share_E[e]).sum()) - 1,
                "attributed_ns": float(share_E[e] * self.time_ns),
            }
            for e in order
        ]


@dataclass
class Ledger:
    """Attributed time by (layer, phase)."""

    of: dict[tuple[int, str], Attributed] = field(default_factory=dict)

    def add(
        self, layer: int, phase: str, rows_E: NDArray[np.int64], curve: Curve, time_ns: float
    ) -> None:
        """Add a forward of a layer."""
        if (found := self.of.get((layer, phase))) is None or len(found.rows_E) != len(rows_E):
            zeros = np.zeros(len(rows_E), np.int64)
            found = self.of[layer, phase] = Attributed(zeros, zeros.astype(np.float64))
        found.add(rows_E, curve, time_ns)


def points(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    rows = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*rows, most] if most > 0 else []


def measure_curve(
    layer: MoELayer,
    most: int,
    repeats: int,
    seed: int,
    *,
    beside: Callable[[], object],
    rows_E: NDArray[np.int64],
) -> Curve:
    """Measure the curve of a layer's experts.

    Args:
        layer: Of the shape, forced to the backend that runs the forward beside it: another one's
            time for the same rows says nothing of that forward.
        most: Rows up to which.
        repeats: Measurements of each point; the median counts.
        seed: Of the inputs.
        beside: The layer at work on some forward, to check the curve's sum against.
        rows_E: Rows of each expert in that forward.
    """
    generator = torch.Generator(layer.device).manual_seed(seed)
    x_TD = torch.randn(most, layer.hidden, device=layer.device, generator=generator)
    x_TD = x_TD.to(layer.dtype)
    rows = points(most)
    works = {"layer": beside, "0": _products(layer, x_TD[:1], -1)}
    # On a GPU the cache is emptied before each measurement, and a graph holds one of them.
    turns = range(min(_ROTATED, layer.experts) if layer.device.type == "cpu" else 1)
    for n in rows:
        works[str(n)] = _in_turn([_products(layer, x_TD[:n], expert) for expert in turns])
    graphs = in_graphs(layer, most)
    seconds = interleaved(works, repeats, layer.device, graphs=graphs)
    taken = {name: 1e9 * median(rounds) for name, rounds in seconds.items()}
    base = taken["0"]
    curve = Curve(rows, [max(0.0, taken[str(n)] - base) for n in rows], base)
    return replace(curve, layer_ns=taken["layer"], sum_ns=float(curve.at(rows_E).sum()))


def _products(layer: MoELayer, x_TD: torch.Tensor, expert: int) -> Callable[[], object]:
    """The matrix products of a layer whose only rows are those of one expert (-1: none)."""
    ids_TK = torch.full((len(x_TD), 1), expert, dtype=torch.int32, device=layer.device)
    parts = layer.parts(x_TD, ids_TK, torch.ones(len(x_TD), 1, device=layer.device))
    mine = [parts[name] for name in _PRODUCTS if name in parts]

    def run() -> object:
        layer.expect([len(x_TD)])
        for part in mine:
            part()
        return None

    return run


def _in_turn(works: list[Callable[[], object]]) -> Callable[[], object]:
    """Each call runs the next of them."""
    calls = 0

    def run() -> object:
        nonlocal calls
        calls += 1
        return works[calls % len(works)]()

    return run
