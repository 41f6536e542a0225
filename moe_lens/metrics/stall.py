"""What misses cost: bytes of an expert over the bandwidth of the link that it comes through."""

from __future__ import annotations

PCIE4_GB_PER_S = 25.0
"""What a PCIe 4 link of 16 lanes carries in practice; 31.5 GB/s is what its lanes could."""

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
"""Bytes of a weight; scales of quantised formats are left out."""


def expert_bytes(hidden: int, intermediate: int, dtype: str = "bfloat16") -> float:
    """Bytes of one expert: gate, up and down, each hidden x intermediate (SwiGLU).

    Raises:
        ValueError: The size of a weight of this type is not known.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype must be one of {', '.join(BYTES)}; got {dtype!r}")
    return 3 * hidden * intermediate * BYTES[dtype]


def stall_seconds(misses: float, bytes_each: float, gb_per_s: float = PCIE4_GB_PER_S) -> float:
    """Seconds that so many loads take one after another, with nothing hidden behind computing.

    Args:
        misses: Loads, for example (1 - hit rate) x requests of an access.
        bytes_each: Of one expert.
        gb_per_s: Bandwidth, 10^9 bytes a second.

    Raises:
        ValueError: The bandwidth is not above 0.
    """
    if not gb_per_s > 0:
        raise ValueError(f"the bandwidth must be above 0 GB/s; got {gb_per_s:g}")
    return misses * bytes_each / (gb_per_s * 1e9)
