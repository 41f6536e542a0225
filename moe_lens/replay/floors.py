"""The least time that a machine could take: what must be computed, and what must be moved.

A stage takes at least its operations at the matrix rate, and at least its bytes at the bandwidth;
the larger of the two is its floor. Rows and touched experts are counted from the routing
that is replayed, never expected values. The same formulas hold on a CPU, with its own ceilings.

T tokens, S rows that experts compute (slots that were not dropped), U touched experts, D hidden,
F an expert's intermediate size, b bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("plan", "permute", "gate_up", "act", "down", "combine")
TILE = 128
"""Rows of a tile by which padding is counted: what grouped matrix products on GPUs take in
prefill. Smaller tiles pad less."""

_INT = 4


@dataclass(frozen=True)
class Shape:
    """One MoE layer: E, D, F, and the dtype of weights and rows."""

    experts: int
    hidden: int
    intermediate: int
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class Ceiling:
    """What a machine reaches: bytes that are moved (read and written), and operations."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must be read or written."""

    flop: int
    bytes: int

    def floor_ns(self, ceiling: Ceiling) -> float:
        """The least time, ns."""
        return 1e9 * max(self.flop / ceiling.flop_per_s, self.bytes / ceiling.bytes_per_s)


def stages(
    tokens: int, rows: int, touched: int, shape: Shape, *, gathers: bool = False
) -> dict[str, Work]:
    """Each stage of a layer that leaves a stage's result in memory for the next.

    Args:
        tokens: T.
        rows: S.
        touched: U.
        shape: Of the layer.
        gathers: The first product reads tokens in place of gathered rows, and writes what SwiGLU
            makes of its own: permute and act have no work then.
    """
    wide = shape.hidden * shape.itemsize
    inner = shape.intermediate * shape.itemsize
    expert = shape.hidden * shape.intermediate * shape.itemsize
    product = rows * shape.hidden * shape.intermediate
    maps = 2 * _INT * rows
    if gathers:
        moved = tokens * wide + _INT * rows + touched * 2 * expert + rows * inner
        first = {"permute": Work(0, 0), "gate_up": Work(4 * product, moved), "act": Work(0, 0)}
        return {**stages(tokens, rows, touched, shape), **first}
    return {
        # ids read for the counts and again for the order; rows, slots and places written
        "plan": Work(0, 2 * _INT * rows + 3 * _INT * rows),
        "permute": Work(0, tokens * wide + rows * wide + maps),
        "gate_up": Work(4 * product, rows * wide + touched * 2 * expert + rows * 2 * inner),
        "act": Work(0, 3 * rows * inner),
        "down": Work(2 * product, rows * inner + touched * expert + rows * wide),
        "combine": Work(0, rows * wide + tokens * wide + maps),
    }


def fused(tokens: int, rows: int, touched: int, shape: Shape) -> Work:
    """A layer that keeps everything between its input and its output on the chip.

    Touched weights are read once, tokens read and written once.
    """
    product = rows * shape.hidden * shape.intermediate
    weights = touched * 3 * shape.hidden * shape.intermediate
    return Work(6 * product, (weights + 2 * tokens * shape.hidden) * shape.itemsize)


def padded_rows(rows_E: list[int], tile: int = TILE) -> int:
    """Rows that are added where each expert's rows fill whole tiles."""
    return sum(-n % tile for n in rows_E)
