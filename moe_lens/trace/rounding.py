"""Floats with cleared low mantissa bits: still plain floats to every reader, but they compress."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BF16_BITS = 7
"""Explicit mantissa bits of bfloat16: relative error at most 2^-8 = 0.39 %."""

SUM_BITS = 11
"""Mantissa bits kept of the float sums in `load`: relative error at most 2^-12 = 0.024 %."""


_LARGE = int(np.float32(3e38).view(np.uint32))
"""Rounding cannot carry a float32 below this over into infinity; its bits, as an integer."""


def keep_mantissa(
    x: NDArray[Any], bits: int, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """`x` as float32 with `bits` explicit mantissa bits, round half to even; NaN stays NaN.

    Args:
        x: Any floats.
        bits: Explicit mantissa bits that are kept.
        out: Where they go (contiguous, of the shape of `x`); None: a new array.
    """
    exact = np.ascontiguousarray(x, dtype=np.float32)
    number = np.empty_like(exact) if out is None else out
    cleared = 23 - bits
    word, rounded = exact.view(np.uint32), number.view(np.uint32)
    np.right_shift(word, np.uint32(cleared), out=rounded)
    rounded &= np.uint32(1)
    rounded += np.uint32((1 << (cleared - 1)) - 1)
    rounded += word
    rounded &= np.uint32(0xFFFFFFFF << cleared & 0xFFFFFFFF)
    # Infinities and NaN have the largest bits of all, and whatever is below zero has larger ones.
    if word.max(initial=0) >= _LARGE:
        # Adding could carry a NaN's payload over into a number, and the largest finite values
        # (logits masked with finfo.min) into infinity.
        np.copyto(number, exact, where=~(np.isfinite(exact) & np.isfinite(number)))
    return number
