"""Floats with cleared low mantissa bits: still plain floats to every reader, but they compress."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BF16_BITS = 7
"""Explicit mantissa bits of bfloat16: relative error at most 2^-8 = 0.39 %."""

SUM_BITS = 11
"""Mantissa bits kept of the float sums in `load`: relative error at most 2^-12 = 0.024 %."""


def keep_mantissa(x: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """`x` as float32 with `bits` explicit mantissa bits, round half to even; NaN stays NaN."""
    exact = np.ascontiguousarray(x, dtype=np.float32)
    cleared = 23 - bits
    word = exact.view(np.uint32)
    half = np.uint32((1 << (cleared - 1)) - 1)
    rounded = word + half + ((word >> np.uint32(cleared)) & np.uint32(1))
    rounded &= np.uint32(0xFFFFFFFF << cleared & 0xFFFFFFFF)
    # Adding could carry a NaN's payload over into a number, and the largest finite values (logits
    # masked with finfo.min) into infinity.
    number = rounded.view(np.float32)
    return np.where(np.isfinite(exact) & np.isfinite(number), number, exact)
