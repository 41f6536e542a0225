"""Sizes: what they are called, which are refused, and equal active parameters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import LabError
from moe_lens.granularity.shapes import (
    Shape,
    active_of_student,
    active_of_teacher,
    check_kind,
    matched,
    read_name,
)


def test_names() -> None:
    assert Shape(16, 8, 4).name == "16e8a"
    assert read_name(" 16e8a ") == (16, 8)


@pytest.mark.parametrize("text", ["", "16", "16e", "e8a", "16x8a", "16e8a4", "-1e2a", "1.5e2a"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(LabError, match=r"written as 16e8a .*; got"):
        read_name(text)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((4, 8, 1), r"4e8a: a token cannot use 8 of 4 experts"),
        ((4, 0, 1), r"4e0a: a token uses at least 1 expert, got 0"),
        ((4, 2, 0), r"4e2a: experts of width 0; a width is at least 1"),
    ],
)
def test_layers_that_cannot_be(shape: tuple[int, int, int], says: str) -> None:
    with pytest.raises(LabError, match=says):
        Shape(*shape)


@given(top_k=st.integers(1, 64), active=st.integers(1, 400))
def test_matching_spends_what_there_is(top_k: int, active: int) -> None:
    if top_k > active:
        with pytest.raises(LabError, match="width below 1"):
            matched(2 * top_k, top_k, active)
        return
    shape = matched(2 * top_k, top_k, active)
    assert shape.experts == 2 * shape.top_k
    spent = shape.top_k * shape.width
    assert spent <= active < spent + top_k


def test_the_papers_sizes() -> None:
    assert (active_of_teacher(256), active_of_student(256)) == (256, 320)
    assert matched(16, 8, 256).width == 32
    assert matched(12, 6, 320).width * 6 == 318
    assert [matched(2 * k, k, active_of_student(32)).width for k in (1, 2, 4, 8)] == [40, 20, 10, 5]


def test_too_many_experts_and_none_keep_their_own_words() -> None:
    with pytest.raises(LabError, match="cannot use 8 of 4"):
        matched(4, 8, 32)
    with pytest.raises(LabError, match="at least 1 expert"):
        matched(4, 0, 32)


def test_kinds() -> None:
    assert check_kind("relu") == "relu"
    with pytest.raises(LabError, match="constant, linear or relu; got 'gelu'"):
        check_kind("gelu")
