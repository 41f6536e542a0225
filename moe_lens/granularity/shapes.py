"""Which layers are compared? Their sizes, and widths that make active parameters equal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from moe_lens.errors import LabError

Kind = Literal["constant", "linear", "relu"]
"""What an expert computes: a vector of its own, two linear maps, or these with a ReLU between."""


@dataclass(frozen=True, order=True)
class Shape:
    """Experts of a layer.

    Attributes:
        experts: m.
        top_k: k, how many of them a token uses.
        width: w, hidden neurons of an expert.

    Raises:
        LabError: No such layer can be.
    """

    experts: int
    top_k: int
    width: int

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise LabError(f"{self.name}: a token uses at least 1 expert, got {self.top_k}.")
        if self.top_k > self.experts:
            raise LabError(
                f"{self.name}: a token cannot use {self.top_k} of {self.experts} experts; "
                "the second number is at most the first."
            )
        if self.width < 1:
            raise LabError(
                f"{self.name}: experts of width {self.width}; a width is at least 1. "
                "Take fewer experts a token, or a larger hidden size."
            )

    @property
    def name(self) -> str:
        """As the paper's code has it: 16e8a is 16 experts of which 8 are active."""
        return f"{self.experts}e{self.top_k}a"


def read_name(text: str) -> tuple[int, int]:
    """`16e8a` as (16, 8).

    Raises:
        LabError: It is not so written.
    """
    found = re.fullmatch(r"(\d+)e(\d+)a", text.strip())
    if found is None:
        raise LabError(f"a layer is written as 16e8a (16 experts, 8 a token); got {text!r}.")
    return int(found[1]), int(found[2])


def matched(experts: int, top_k: int, active: int) -> Shape:
    """The shape whose active neurons k w are `active`, or the most below it.

    Raises:
        LabError: k is above m or below 1, or no width of at least 1 is left.
    """
    if top_k > max(active, 0):
        raise LabError(
            f"{experts}e{top_k}a: {active} active neurons over {top_k} experts a token leave a "
            "width below 1. Take fewer experts a token, or a larger hidden size."
        )
    # k = 0 is refused by Shape, in its own words.
    return Shape(experts, top_k, active // max(top_k, 1))


def active_of_teacher(hidden: int) -> int:
    """Active neurons of a teacher: as many as there are inputs."""
    return hidden


def active_of_student(hidden: int) -> int:
    """Active neurons of a student: a quarter more than its teacher's."""
    return 5 * hidden // 4


def check_kind(kind: str) -> Kind:
    """The kind of expert of this name.

    Raises:
        LabError: There is none.
    """
    for known in get_args(Kind):
        if kind == known:
            return known  # type: ignore[no-any-return]
    raise LabError(f"experts are constant, linear or relu; got {kind!r}.")
