"""Stored questions: what their heads say, and what they refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_lens.errors import QueryError
from moe_lens.queries.catalog import Parameter, parse, question, questions

HEAD = """-- What happened.
-- And why.
-- $first_step int = 3: first step that counts
-- $phase text = null: only this phase
-- $share float = 0.5: of something
-- $by_tag bool = true: one row per tag
select 1
"""


def test_reads_a_head() -> None:
    asked = parse("x", HEAD)
    assert asked.doc == "What happened.\nAnd why."
    assert asked.parameters == (
        Parameter("first_step", "int", 3, "first step that counts"),
        Parameter("phase", "text", None, "only this phase"),
        Parameter("share", "float", 0.5, "of something"),
        Parameter("by_tag", "bool", True, "one row per tag"),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("select 1", "no head comment"),
        ("-- Doc.\n-- $x integer = 1: doc\nselect 1", "cannot read the parameter line"),
        ("-- Doc.\n-- $x int = 1: doc\n-- More.\nselect 1", "follows the parameters"),
    ],
)
def test_a_bad_head_is_refused(text: str, says: str) -> None:
    with pytest.raises(QueryError, match=says):
        parse("x", text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"first_step": 3, "phase": None, "share": 0.5, "by_tag": True}),
        ({"first_step": "7", "share": "1", "by_tag": "false"},
         {"first_step": 7, "phase": None, "share": 1.0, "by_tag": False}),
        ({"first_step": np.int64(7), "phase": "eval", "share": np.float32(2)},
         {"first_step": 7, "phase": "eval", "share": 2.0, "by_tag": True}),
        ({"first_step": None}, {"first_step": None, "phase": None, "share": 0.5, "by_tag": True}),
    ],
)  # fmt: skip
def test_binds_values_from_python_and_from_text(given: dict, expected: dict) -> None:
    assert parse("x", HEAD).bind(given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"fist_step": 1},
            r"no parameter 'fist_step'. It has: first_step \(int, default 3\), phase",
        ),
        ({"first_step": "x"}, "first_step must be int, got 'x'. It is: first step that counts."),
        ({"first_step": 1.5}, "must be int, got 1.5"),
        ({"first_step": True}, "must be int, got True"),
        ({"phase": 3}, "must be text, got 3"),
        ({"by_tag": "yes"}, "must be bool, got 'yes'"),
        ({"share": "half"}, "must be float, got 'half'"),
    ],
)
def test_a_wrong_parameter_is_named(given: dict, says: str) -> None:
    with pytest.raises(QueryError, match=says):
        parse("x", HEAD).bind(given)


def test_an_unknown_question_lists_the_known() -> None:
    with pytest.raises(QueryError, match=r"(?s)Did you mean expert_load.*capture_health.* dropped"):
        question("experts_load")


@pytest.mark.parametrize("name", list(questions()))
def test_every_stored_question_uses_what_it_declares(name: str) -> None:
    asked = questions()[name]
    body = "\n".join(line for line in asked.sql.splitlines() if not line.startswith("--"))
    assert set(re.findall(r"\$(\w+)", body)) == {p.name for p in asked.parameters}


@pytest.mark.parametrize("name", [n for n in questions() if n != "run_totals"])
def test_every_stored_question_can_be_narrowed(name: str) -> None:
    names = [p.name for p in questions()[name].parameters]
    assert names[:3] == ["first_step", "last_step", "phase"]


# What Spark lacks, or reads differently (seen to fail or to give another answer).
NOT_PORTABLE = re.compile(
    r"\b(list_\w+|len|list_zip|within group|with ordinality|exclude|hugeint)\b|::", re.IGNORECASE
)


@pytest.mark.parametrize("name", list(questions()))
def test_stored_questions_keep_to_portable_sql(name: str) -> None:
    body = "\n".join(
        line for line in questions()[name].sql.splitlines() if not line.startswith("--")
    )
    assert NOT_PORTABLE.findall(body) == []
