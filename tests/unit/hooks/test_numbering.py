"""Numbers of steps and forwards, the user's and our own."""

from __future__ import annotations

import pytest

from moe_lens_hooks.numbering import Numbering


def run(numbering, plan):
    """Steps as the user makes them: a number, None (unnumbered), or "outside", of n forwards."""
    out = []
    for said, forwards in plan:
        if said == "outside":
            for _ in range(forwards):
                numbering.outside()
                out.append((numbering.step, numbering.take()))
                numbering.end(inside=False)
            continue
        numbering.begin(said)
        out += [(numbering.step, numbering.take()) for _ in range(forwards)]
        if forwards:
            numbering.end(inside=True)
    return out


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ([(None, 2), ("outside", 2), (None, 1)], [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]),
        ([(7, 1), (None, 1), (20, 1)], [(7, 0), (8, 0), (20, 0)]),
        ([(7, 2), ("outside", 2), (8, 1)], [(7, 0), (7, 1), (7, 2), (7, 3), (8, 0)]),
        ([(7, 1), (7, 1), (8, 1)], [(7, 0), (7, 1), (8, 0)]),
        (
            [("outside", 3), (0, 1), (1, 2), (3, 1)],
            [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (1, 2), (3, 0)],
        ),
        (
            [("outside", 2), (0, 1), ("outside", 1), (1, 1)],
            [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)],
        ),
        ([(5, 0), (5, 1)], [(5, 0)]),
    ],
)
def test_numbers(plan, expected):
    got = run(Numbering(0, resumed=False), plan)
    assert got == expected
    assert len(set(got)) == len(got)


@pytest.mark.parametrize(
    ("plan", "number", "message"),
    [
        ([(7, 1)], 3, "step number 3 must be at least 8, or the last one once more: 7"),
        ([(None, 1), (None, 1)], 0, "must be at least 2, or the last one once more: 1"),
        ([("outside", 2), (1, 1)], 0, "must be at least 2, or the last one once more: 1"),
    ],
)
def test_numbers_do_not_go_back(plan, number, message):
    numbering = Numbering(0, resumed=False)
    run(numbering, plan)
    with pytest.raises(ValueError, match=message):
        numbering.begin(number)


def test_the_first_number_after_a_resume_may_go_back():
    numbering = Numbering(10, resumed=True)
    assert run(numbering, [(4, 2), (5, 1), (None, 1)]) == [(4, 0), (4, 1), (5, 0), (6, 0)]
    with pytest.raises(ValueError, match="must be at least 7"):
        numbering.begin(3)
