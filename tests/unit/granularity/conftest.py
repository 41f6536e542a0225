"""A plan that takes a second, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moe_lens.granularity.presets import Plan, plan
from moe_lens.granularity.runs import Row
from moe_lens.granularity.side_by_side import executed


def small(**more: object) -> Plan:
    """Two teachers' sizes of students, eight inputs, a few steps."""
    made = plan("quick", hidden=8, teacher=(4, 2), students=[(4, 2), (2, 1)], steps=6, seed=3)
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="package")
def planned() -> Plan:
    return small()


@pytest.fixture(scope="package")
def rows(planned: Plan) -> list[Row]:
    return list(executed(planned.runs, planned.recipe))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Students are small: a second thread costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
