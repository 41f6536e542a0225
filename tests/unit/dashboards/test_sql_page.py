"""The SQL page: what it runs, what it refuses, what it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.apptest import button, texts, turned
from support.traces import write_run

from moe_lens.queries.catalog import question

pytestmark = pytest.mark.slow


def run_query(app: Any, text: str) -> Any:
    app.text_area[0].set_value(text).run()
    return button(app, "Run").click().run()


def answer(app: Any) -> Any:
    """The table of the answer: the one of the views' columns stands before it."""
    return app.dataframe[1].value


def test_a_query_gives_a_table(opened: Any, tmp_path: Path) -> None:
    written = write_run(tmp_path / "run")
    app = turned(opened(tmp_path / "run"), "sql")
    text = "select tag, sum(routed)::bigint as n from load group by tag order by tag"
    app = run_query(app, text)
    assert not app.exception
    assert not app.error
    sums: dict[str, int] = {}
    for row in written.rows["load"]:
        sums[row["tag"]] = sums.get(row["tag"], 0) + row["routed"]
    assert answer(app).to_dict("records") == [{"tag": t, "n": n} for t, n in sorted(sums.items())]
    assert app.query_params["q"] == text
    assert "2 rows in" in texts(app)
    # The same link shows the query again, and runs nothing by itself.
    again = turned(opened(tmp_path / "run", q=text), "sql")
    assert again.text_area[0].value == text
    assert len(again.dataframe) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("copy load to '/tmp/never.csv'", "this is COPY"),
        ("from read_text('/etc/passwd')", "read_text() cannot be used"),
        ("selct 1", 'syntax error at or near "selct"'),
        ("select 1; select 2", "2 statements"),
        ("", "no query"),
    ],
)
def test_what_cannot_be_run_says_why(opened: Any, tmp_path: Path, text: str, says: str) -> None:
    write_run(tmp_path / "run", steps=1)
    app = run_query(turned(opened(tmp_path / "run"), "sql"), text)
    assert not app.exception
    assert "could not be run" in app.error[0].value
    assert any(says in code.value for code in app.code)
    assert len(app.dataframe) == 1


def test_a_stored_question_comes_with_the_filters(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    app = turned(opened(tmp_path / "run", first_step="2", tag="code"), "sql")
    app = next(s for s in app.selectbox if s.label.startswith("Begin")).select("load_map").run()
    text = app.text_area[0].value
    assert text == question("load_map").with_values({"first_step": 2, "tag": "code"})
    assert len(answer(button(app, "Run").click().run())) > 0


def test_the_columns_of_a_view_stand_beside(opened: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=1)
    app = turned(opened(tmp_path / "run"), "sql")
    view = next(s for s in app.selectbox if s.label.startswith("Columns"))
    shown = view.select("routers").run().dataframe[0].value
    assert list(shown["column"][:2]) == ["run", "rank"]
    meaning = dict(zip(shown["column"], shown["meaning"], strict=True))
    assert meaning["zloss_sum"] == "squared logsumexp of the logits, nats squared"
