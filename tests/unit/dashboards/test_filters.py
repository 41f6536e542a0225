"""What of a link fits a run, and what is said of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens_dashboards.components.filters import NAMES, Choices, Filters, parse
from moe_lens_dashboards.components.words import plain

RUN = Choices(layers=[0, 1, 2], phases=["train", "eval"], tags=["code", "<b>"], ranks=[0, 3])


def test_a_whole_link() -> None:
    link = {
        "first_step": "2", "last_step": "9", "first_layer": "1", "last_layer": "2",
        "phase": "eval", "tag": "<b>", "rank": "3", "run": "x", "other": "y",
    }  # fmt: skip
    filters, problems = parse(link, RUN)
    assert filters == Filters(2, 9, 1, 2, "eval", "<b>", 3)
    assert problems == []
    assert parse({k: str(v) for k, v in filters.given().items()}, RUN) == (filters, [])
    words = "steps 2 to 9, layers 1 to 2, phase eval, tag <b>, rank 3"
    assert filters.in_words() == words


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("first_step", "-1"), ("first_step", "1.5"), ("first_step", "x"), ("last_step", "٣"),
        ("last_step", "9" * 16), ("first_layer", "3"), ("last_layer", "x"), ("phase", "Train"),
        ("tag", "prose"), ("rank", "1"), ("rank", "true"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_left_out_and_said(name: str, text: str) -> None:
    filters, problems = parse(
        {name: text, "first_step" if name != "first_step" else "rank": "0"}, RUN
    )
    assert name not in filters.given()
    assert len(filters.given()) == 1
    assert len(problems) == 1
    assert f"{name}={text}" in problems[0]


@pytest.mark.parametrize("what", ["step", "layer"])
def test_nothing_lies_between(what: str) -> None:
    filters, problems = parse({f"first_{what}": "2", f"last_{what}": "1"}, RUN)
    assert filters == Filters()
    assert problems == [f"No {what} lies between 2 and 1: both were left out."]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=20)))
def test_any_text_is_taken_or_left_out(link: dict[str, str]) -> None:
    filters, problems = parse(link, RUN)
    taken = filters.given()
    assert all(
        str(value) == link[name] or int(link[name]) == value for name, value in taken.items()
    )
    assert problems or len(taken) == sum(text != "" for text in link.values())


def test_a_span_in_words() -> None:
    assert Filters(first_step=1000).in_words() == "steps from 1,000"
    assert Filters(last_step=5).in_words() == "steps to 5"
    assert Filters(first_layer=4, last_layer=4).in_words() == "layer 4"
    assert Filters().in_words() == ""


def test_markup_is_escaped() -> None:
    assert plain("![x](http://y) <b> `z`\n$a$ :red[b]") == (
        r"\!\[x\]\(http\:\/\/y\) \<b\> \`z\` \$a\$ \:red\[b\]"
    )
    assert plain("Größe 3 × ü") == "Größe 3 × ü"
