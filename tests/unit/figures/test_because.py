"""Blank figures of imported traces say why they are blank, and nothing of how to record."""

from __future__ import annotations

import pandas as pd

from moe_lens.figures.blank import because, blank
from moe_lens.figures.forwards_over_time import forwards_over_time
from moe_lens.trace.meta import Meta

RECORDED = Meta("r")
IMPORTED = Meta("i", imported="x: <f>", lacks={"times": "no <clock>"})


def words(made: object) -> str:
    return " ".join(str(x.text).replace("<br>", " ") for x in made.layout.annotations)  # type: ignore[attr-defined]


def test_advice_is_for_those_who_can_record() -> None:
    made = blank("T", "No times: record(..., times=1).", "No times", lacks=("times",))
    assert because(made, RECORDED) is made
    assert words(because(made, IMPORTED)) == "No times: imported from x (no &lt;clock&gt;)."
    assert because(made, IMPORTED).layout.title.text == "T"


def test_without_a_key_the_sentence_stands_alone() -> None:
    assert words(because(blank("T", "Too few: record more.", "Too few"), IMPORTED)) == "Too few."


def test_what_was_drawn_or_says_no_advice_stays() -> None:
    for made in (blank("T", "Nothing happened."), forwards_over_time(_timed(1.0))):
        assert because(made, IMPORTED) is made


def test_no_times_is_not_no_forward() -> None:
    assert words(forwards_over_time(_timed(None))) == "The trace has no times of forwards."
    assert words(forwards_over_time(_timed(1.0)[:0])) == "No forward was recorded."


def _timed(rate: float | None) -> pd.DataFrame:
    row = {"run": "r", "step": 0, "phase": "train", "forwards": 1, "tokens": 5, "host_ms": rate}
    return pd.DataFrame([row | {"tokens_per_second": rate}])
