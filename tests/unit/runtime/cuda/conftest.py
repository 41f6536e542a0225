"""The kernels on the CPU, and generated routing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cuda_on_cpu import Lanes, on_cpu


@pytest.fixture(scope="module")
def lanes() -> Iterator[Lanes]:
    """`moe_lens.runtime.cuda.kernels` takes CPU tensors while this lasts."""
    with on_cpu() as lanes:
        yield lanes
