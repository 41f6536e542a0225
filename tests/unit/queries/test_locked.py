"""SQL that somebody typed: it reads the views, and does nothing else, for as long as it may."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.traces import write_run

from moe_lens.errors import QueryError, TraceError
from moe_lens.queries import fenced
from moe_lens.queries.catalog import questions
from moe_lens.queries.files import csv_bytes, parquet_bytes
from moe_lens.queries.locked import ask
from moe_lens.queries.session import open_trace

FOREVER = {
    "cte": "with recursive r as (select 1 as n union all select n + 1 from r) select max(n) from r",
    "join": "select sum((a.range * b.range) % 7) from range(10000000) a, range(10000000) b",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A place that every layer between us and the file system would like to read as something else.
    path = tmp_path_factory.mktemp("traces") / "run[1] it's *x=y"
    write_run(path, open_tables=("load",))
    return path


def here(run: Path, text: str) -> list[dict[str, Any]]:
    """What the query gives in this process: quicker, and the same code."""
    table, _ = fenced.run([str(run)], text, seconds=20, rows=100, memory=10**9, skip_damaged=False)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "text",
    [
        "select layer, sum(routed) as n from load group by all order by all",
        "from routing",
        "with x as (select * from load) select count(*) as n from x",
        "describe load",
        "summarize layers",
        "show tables",
        "values (1), (2)",
        "explain select * from load",
        "/* twice */ explain analyze select count(*) from load",
        "pivot load on tag in ('code', 'prose') using sum(routed) group by layer",
        "select * from range(3), unnest([1, 2])",
        'select "copy" from (select \'copy x to y\' as "copy")',
        "select 1;",
    ],
)
def test_what_reads_runs(run: Path, text: str) -> None:
    assert len(here(run, text)) > 0


def test_the_answer_is_that_of_the_trace(run: Path) -> None:
    text = "select run, rank, layer, expert, sum(routed) as n from load group by all order by all"
    with open_trace(run) as trace:
        assert ask([run], text).result.rows() == trace.sql(text).rows()


@pytest.mark.parametrize("name", [n for n in questions() if not n.startswith("diff_")])
def test_stored_questions_run(run: Path, name: str) -> None:
    here(run, questions()[name].with_values({}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("copy load to '{out}'", "COPY"),
        ("with a as (copy (select 1) to '{out}') select 1", "COPY"),
        ("select (with a as (copy (select 1) to '{out}') select 1)", "COPY"),
        ("explain analyze copy (select 1) to '{out}'", "not one"),
        ("explain analyze with a as (copy (select 1) to '{out}') select 1", "COPY"),
        ("explain (analyze) copy (select 1) to '{out}'", "not one"),
        ("copy load to '{segment}'", "COPY"),
        ("with a as (copy (select 1) to '{segment}') select 1", "COPY"),
        ("export database '{out}'", "EXPORT"),
        ("attach '{out}' as other", "ATTACH"),
        ("create table x as select 1", "CREATE"),
        ("create or replace view load as select 1", "CREATE"),
        ("insert into load select * from load", "INSERT"),
        ("with a as (insert into load select * from load returning *) from a", "INSERT"),
        ("drop view load", "DROP"),
        ("install httpfs", "LOAD"),
        ("set threads = 1", "SET"),
        ("pragma threads = 1", "SET"),
        ("call enable_logging()", "CALL"),
        ("pivot load on tag using sum(routed)", "values are listed"),
        ("select 1; select 2", "2 statements"),
        ("select 1; copy load to '{out}'", "2 statements"),
        ("", "no query"),
        ("-- nothing", "no query"),
    ],
)
def test_what_does_more_than_read_is_refused(
    run: Path, tmp_path: Path, text: str, says: str
) -> None:
    before = files(run)
    segment = next(run.glob("load/rank=0/*.parquet"))
    text = text.replace("{out}", str(tmp_path / "out"))
    text = text.replace("{segment}", str(segment).replace("'", "''"))
    with pytest.raises(QueryError, match=says):
        here(run, text)
    assert list(tmp_path.iterdir()) == []
    assert files(run) == before


@pytest.mark.parametrize(
    "text",
    [
        "from read_text('/etc/passwd')",
        "from read_blob('/proc/self/environ')",
        "from glob('/etc/*')",
        "from '/etc/passwd'",
        "from read_csv('/etc/passwd')",
        "from sniff_csv('/etc/passwd')",
        "from read_parquet('/tmp/**')",
        "select * from load where tag in (select content from read_text('/etc/passwd'))",
        "from query('select 1')",
        "from query('with a as (copy (select 1) to ''/tmp/x'') select 1')",
        "from arrow_scan(1, 2, 3)",
        "from json_execute_serialized_sql('{}')",
        "from enable_logging()",
        "from 'https://example.com/x.parquet'",
    ],
)
def test_nothing_but_the_trace_is_read(run: Path, text: str) -> None:
    with pytest.raises(QueryError):
        here(run, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("from read_text('/etc/passwd')", "disabled by configuration"),
        ("with a as (copy (select 1) to '{out}') select 1", "disabled by configuration"),
        ("from enable_logging()", "locked"),
    ],
)
def test_the_second_fence_holds_without_the_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.setattr(fenced, "check", lambda con, text: None)
    with pytest.raises(QueryError, match=says):
        here(run, text.replace("{out}", str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_python_variables_are_no_tables(run: Path) -> None:
    secret = pd.DataFrame({"a": [1]})
    with pytest.raises(QueryError, match="secret does not exist"):
        here(run, "from secret")
    assert len(secret) == 1


@pytest.mark.parametrize("text", FOREVER.values(), ids=FOREVER)
def test_what_never_ends_is_cancelled(run: Path, text: str) -> None:
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"Cancelled after 0\.3 s"):
        ask([run], text, seconds=0.3)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "text",
    [
        "select range(3000000000)",
        "select list_sum(list_transform(range(300000000), lambda x: x + 1))",
        "select list(a.range) from range(1000000000) a",
    ],
)
def test_memory_is_bounded(run: Path, text: str) -> None:
    with pytest.raises(QueryError, match=r"(?i)memory"):
        ask([run], text, memory=10**8)


def test_rows_are_bounded_and_it_is_said(run: Path) -> None:
    some = ask([run], "from range(100)", rows=10)
    assert (len(some.result), some.complete) == (10, False)
    all_of_them = ask([run], "from range(10)", rows=10)
    assert (len(all_of_them.result), all_of_them.complete) == (10, True)


def test_mistakes_keep_the_message_of_duckdb(run: Path) -> None:
    with pytest.raises(QueryError, match=r"syntax error at or near \"selct\"[^$]*\^"):
        ask([run], "selct 1")
    with pytest.raises(QueryError, match='"nope" not found'):
        here(run, "select nope from load")


def test_a_run_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        ask([tmp_path / "gone"], "select 1")


def test_answers_as_files(run: Path, tmp_path: Path) -> None:
    found = ask([run], "select step, expert_ids, dropped from routing order by all limit 5").result
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(found))
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == found.rows()
    lines = csv_bytes(found).decode().splitlines()
    assert lines[0] == "step,expert_ids,dropped"
    first = found.rows()[0]
    assert lines[1].startswith(f'{first["step"]},"{first["expert_ids"]}"')
