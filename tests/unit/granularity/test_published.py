"""The author's tables: their shape, and what the paper reads from them."""

from __future__ import annotations

from moe_lens.granularity.published import (
    GRID,
    SWEEP,
    SWEEP_FACTORS,
    SWEEP_TOP_KS,
    TOP_KS,
    of_grid,
    of_sweep,
)


def test_shapes() -> None:
    assert [len(row) for row in GRID] == [len(TOP_KS)] * len(TOP_KS)
    assert [len(row) for row in SWEEP] == [len(SWEEP_FACTORS)] * len(SWEEP_TOP_KS)


def test_rows_are_students_and_columns_teachers() -> None:
    assert of_grid(student=2, teacher=16) == 0.23
    assert of_grid(student=16, teacher=2) == 0.0014
    assert of_grid(student=8, teacher=8) == 4.4e-5
    assert of_grid(student=3, teacher=8) is of_grid(student=8, teacher=1) is None
    assert of_sweep(top_k=2, factor=16) == 0.188
    assert of_sweep(top_k=8, factor=1) == 0.0035
    assert of_sweep(top_k=1, factor=1) is of_sweep(top_k=2, factor=3) is None


def test_fewer_experts_a_token_are_worse_than_as_many_or_more() -> None:
    for teacher in range(len(TOP_KS)):
        column = [row[teacher] for row in GRID]
        assert column[:teacher] == sorted(column[:teacher], reverse=True)
        assert min(column[:teacher], default=1) > max(column[teacher:])
