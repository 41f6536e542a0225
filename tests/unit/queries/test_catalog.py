"""Stored questions: what their heads say, and what they refuse."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.traces import write_run

from moe_lens.errors import QueryError
from moe_lens.queries.catalog import Parameter, parse, question, questions
from moe_lens.queries.session import Trace, open_trace

HEAD = """-- What happened.
-- And why.
-- $first_step int = 3: first step that counts
-- $phase text = null: only this phase
-- $share float = 0.5: of something
-- $by_tag bool = true: one row per tag
-- $by text = lift (lift or share): what to rank by
-- $every int = 1 (1 or more): steps per bucket
select 1
"""

DEFAULTS = {
    "first_step": 3, "phase": None, "share": 0.5, "by_tag": True, "by": "lift", "every": 1,
}  # fmt: skip


def test_reads_a_head() -> None:
    asked = parse("x", HEAD)
    assert asked.doc == "What happened.\nAnd why."
    assert asked.parameters == (
        Parameter("first_step", "int", 3, "first step that counts"),
        Parameter("phase", "text", None, "only this phase"),
        Parameter("share", "float", 0.5, "of something"),
        Parameter("by_tag", "bool", True, "one row per tag"),
        Parameter("by", "text", "lift", "what to rank by", choices=("lift", "share")),
        Parameter("every", "int", 1, "steps per bucket", least=1),
    )
    assert asked.signature() == (
        "first_step (int, default 3), phase (text, optional), share (float, default 0.5), "
        "by_tag (bool, default true), by (text, lift or share, default lift), "
        "every (int, 1 or more, default 1)"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("select 1", "no head comment"),
        ("-- Doc.\n-- $x integer = 1: doc\nselect 1", "cannot read the parameter line"),
        ("-- Doc.\n-- $x int = 1: doc\n-- More.\nselect 1", "follows the parameters"),
        ("-- Doc.\n-- $x int = 1 (a or b): doc\nselect 1", r"\$x is int, and \(a or b\) does not"),
        ("-- Doc.\n-- $x text = a (1 or more): doc\nselect 1", r"\(1 or more\) does not fit"),
        ("-- Doc.\n-- $x bool = true (a or b): doc\nselect 1", "does not fit"),
        ("-- Doc.\n-- $x int = 1 (2 or more): doc\nselect 1", r"default of \$x, 1, is not \(2 or"),
        ("-- Doc.\n-- $x text = c (a or b): doc\nselect 1", r"default of \$x, c, is not \(a or b"),
    ],
)
def test_a_bad_head_is_refused(text: str, says: str) -> None:
    with pytest.raises(QueryError, match=says):
        parse("x", text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"first_step": "7", "share": "1", "by_tag": "false", "by": "share", "every": "2"},
         {"first_step": 7, "share": 1.0, "by_tag": False, "by": "share", "every": 2}),
        ({"first_step": np.int64(7), "phase": "eval", "share": np.float32(2)},
         {"first_step": 7, "phase": "eval", "share": 2.0}),
        ({"first_step": None}, {"first_step": None}),
    ],
)  # fmt: skip
def test_binds_values_from_python_and_from_text(given: dict, expected: dict) -> None:
    assert parse("x", HEAD).bind(given) == DEFAULTS | expected


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
        ({"by": "size"}, "x: by must be lift or share, got 'size'. It is: what to rank by."),
        ({"by": None}, "by must be lift or share, got None"),
        ({"every": 0}, "x: every must be 1 or more, got 0. It is: steps per bucket."),
        ({"every": "-3"}, "every must be 1 or more, got '-3'"),
        ({"every": None}, "every must be 1 or more, got None"),
    ],
)
def test_a_wrong_parameter_is_named(given: dict, says: str) -> None:
    with pytest.raises(QueryError, match=says):
        parse("x", HEAD).bind(given)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("run")
    write_run(path, ranks=(0, 1), world=2, steps=4, tokens=20, tags=("it's", "prose"))
    return open_trace(path)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
tricky = st.sampled_from(["'", "''; drop", "$first_step", "--", "/*", "\\", "\n", "a\0b", "null"])
# DuckDB would rather not subtract from the smallest integers.
numbers = st.integers(-(2**62), 2**62)


@settings(max_examples=200, deadline=None)
@given(
    word=texts | tricky | st.none(),
    other=texts | tricky,
    number=numbers | st.none(),
    share=st.floats(allow_nan=False) | st.just(0.1),
    flag=st.booleans(),
)
def test_the_sql_with_values_says_the_same(
    trace: Trace, word: str | None, other: str, number: int | None, share: float, flag: bool
) -> None:
    asked = parse(
        "x",
        "-- What of it.\n-- $word text = null: a text\n-- $other text = x: a text\n"
        "-- $number int = null: a number\n-- $share float = 1: a share\n"
        "-- $flag bool = true: a flag\n"
        "select $word as word, $other as other, 1-$number as number, 'it''s $word' as plain,\n"
        "  0-$share as share, typeof($share) as type, $flag as flag -- of $other\n"
        "where $word is null or $word = $word",
    )
    given = {"word": word, "other": other, "number": number, "share": share, "flag": flag}
    shown = asked.with_values(given)
    assert shown.startswith("-- What of it.\nselect ")
    bound = trace.sql(asked.sql, **asked.bind(given)).rows()
    assert trace.sql(shown).rows() == bound
    assert bound[0]["type"] == "DOUBLE"


@pytest.mark.parametrize("name", [n for n in questions() if not n.startswith("diff_")])
def test_every_stored_question_with_values_gives_its_answer(trace: Trace, name: str) -> None:
    filters = {
        "first_step": 1, "last_step": 2, "phase": "train", "tag": "it's", "rank": 1,
        "first_layer": 0, "last_layer": 0,
    }  # fmt: skip
    asked = question(name)
    some = {p.name: filters[p.name] for p in asked.parameters if p.name in filters}
    for values in ({}, some):
        shown = asked.with_values(values)
        assert not re.search(r"\$\w", shown.split("\nselect")[-1])
        # Floats are summed in the order in which threads finish.
        pd.testing.assert_frame_equal(trace.sql(shown).df(), trace.query(name, **values).df())


def test_values_that_do_not_fit_are_refused_in_sql_too() -> None:
    with pytest.raises(QueryError, match="by must be lift or share, got 'size'"):
        parse("x", HEAD).with_values({"by": "size"})


def test_an_unknown_question_lists_the_known() -> None:
    with pytest.raises(QueryError, match=r"(?s)Did you mean expert_load.*capture_health.* dropped"):
        question("experts_load")


@pytest.mark.parametrize("name", list(questions()))
def test_every_stored_question_uses_what_it_declares(name: str) -> None:
    asked = questions()[name]
    body = "\n".join(line for line in asked.sql.splitlines() if not line.startswith("--"))
    assert set(re.findall(r"\$(\w+)", body)) == {p.name for p in asked.parameters}


# The first two are of whole runs; the others of batches that were measured apart from any step.
WITHOUT_STEPS = ("run_totals", "recent", "expert_importance", "route_regret", "route_changes")


@pytest.mark.parametrize("name", [n for n in questions() if n not in WITHOUT_STEPS])
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
