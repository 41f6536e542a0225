"""The list of questions in docs/queries.md is the catalogue."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from moe_lens.queries.catalog import questions
from moe_lens.queries.listing import SUBJECTS, first_sentence, markdown, renewed

PAGE = Path(__file__).parents[3] / "docs" / "queries.md"


def test_the_page_lists_the_catalogue() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == renewed(page), "renew it: python -m moe_lens.queries.listing docs/queries.md"


def test_every_question_stands_in_the_list_once() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", markdown(), re.MULTILINE)
    assert Counter(listed) == Counter(list(questions()))


def test_every_question_has_a_subject() -> None:
    named = [name for names in SUBJECTS.values() for name in names]
    assert sorted(named) == sorted(questions())


def test_a_sentence_is_cut_at_its_end() -> None:
    assert first_sentence("Load of\neach a|b, 0.5 of it. More.") == "Load of each a\\|b, 0.5 of it."


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no <!-- questions: begin -->"):
        renewed("# Questions\n")
