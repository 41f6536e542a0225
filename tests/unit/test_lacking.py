"""Sentences on what a trace lacks: of one that was recorded, and of one that was imported."""

from __future__ import annotations

import pytest

from moe_lens.lacking import made_up, no_rows, not_there, origin
from moe_lens.trace.meta import Meta

RECORDED = Meta("r")
IMPORTED = Meta("i", imported="vllm: out.npz", lacks={"weights": "vLLM returns none"})


def test_a_recorded_trace_can_be_recorded_again() -> None:
    assert not_there(RECORDED, "weights", otherwise="record it") == "record it"
    assert origin(RECORDED) == ""
    text = no_rows(RECORDED, unowned=False)
    assert text == "no per-token rows: record with tokens=1.0 (moe-lens record --tokens 1)"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("weights",), "imported from vllm (vLLM returns none)"),
        (("logits", "weights"), "imported from vllm (vLLM returns none)"),
        (("times",), "imported from vllm, which does not hold that"),
        ((), "imported from vllm, which does not hold that"),
    ],
)
def test_an_imported_one_says_why(asked: tuple[str, ...], says: str) -> None:
    assert not_there(IMPORTED, *asked, otherwise="record it") == says


def test_the_key_that_says_most_comes_first() -> None:
    both = Meta("i", imported="x: y", lacks={"tokens": "counts", "sequences": "unknown"})
    assert not_there(both, "sequences", "tokens") == "imported from x (unknown)"
    assert no_rows(both, unowned=False) == "no per-token rows: imported from x (counts)"
    text = "choices of single tokens, but not whose tokens they are: imported from x (unknown)"
    assert no_rows(both, unowned=True) == text


def test_forwards_that_were_run_need_no_word() -> None:
    assert made_up("") == ""
    assert "(in the order of the file)" in made_up("in the order of the file")
