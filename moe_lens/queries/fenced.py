"""SQL that somebody typed, where it can only read the views of a trace: the process that runs it.

Two fences, each enough by itself for what it guards. Before anything runs, DuckDB's own parser says
what the text is: one query, made of nodes that read, over views and a few harmless table functions
(a CTE may hold COPY or INSERT, and EXPLAIN ANALYZE runs what it explains, so the kind of statement
alone says too little). And it runs on a connection that may open the trace's files and no others,
cannot be configured any more, sees no Python variables, loads no extensions and writes no temporary
files. `locked.ask` runs this file as a process of its own, which can be ended at any time and has a
bound on its memory (DuckDB's own is not asked by every function).
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa

from moe_lens.errors import MoeLensError, QueryError
from moe_lens.queries.about import unique_names
from moe_lens.queries.counterfactual import result_files
from moe_lens.queries.views import create_views, literal, path_literal
from moe_lens.trace.reader import RunFiles, open_run

_READING = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
"""Kinds of query node that only read; DuckDB has others (COPY_QUERY_NODE, INSERT_QUERY_NODE)."""

_FUNCTIONS = re.compile(r"range|generate_series|unnest|repeat|repeat_row|duckdb_\w+", re.IGNORECASE)
"""Table functions that open no file, take no pointer and run no further SQL."""

_EXPLAIN = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*explain\s+(?:analyze\s+)?(?:\([^()]*\)\s*)?(.*)",
    re.IGNORECASE | re.DOTALL,
)

_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
}


def run(
    paths: list[str], text: str, *, seconds: float, rows: int, memory: int, skip_damaged: bool
) -> tuple[pa.Table, float]:
    """Run one query that reads, in this process.

    Returns:
        At most `rows` + 1 rows, and how many seconds the query took.

    Raises:
        QueryError: Not such a query, or DuckDB's message, or it took too long.
        TraceError: A run cannot be read.
    """
    names = unique_names([Path(p) for p in paths])
    files = {name: open_run(path, skip_damaged=skip_damaged) for name, path in names.items()}
    con = duckdb.connect(config={**_CONFIG, "memory_limit": f"{memory}B"})
    try:
        con.execute("set enable_progress_bar = false")
        create_views(con, files)
        _lock(con, files)
        check(con, text)
        return _run(con, text, seconds, rows)
    finally:
        con.close()


def cancelled(seconds: float) -> str:
    """What is said of a query that took too long."""
    return f"Cancelled after {seconds:g} s. Ask for fewer steps, layers or tables."


def check(con: duckdb.DuckDBPyConnection, text: str) -> None:
    """See that a text is one query that reads.

    Raises:
        QueryError: It is not; says what it is.
    """
    try:
        statements = con.extract_statements(text)
    except duckdb.Error as e:
        raise QueryError(str(e)) from e
    if not statements:
        raise QueryError("There is no query in it. Write one, as: from load limit 10")
    if len(statements) > 1:
        raise QueryError(f"These are {len(statements)} statements. Run one at a time.")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        explained = _EXPLAIN.fullmatch(text)
        text = explained[1] if explained else ""
    elif kind == duckdb.StatementType.MULTI:
        raise _refusal("a PIVOT reads only where its values are listed: pivot … on … in (…)")
    elif kind != duckdb.StatementType.SELECT:
        raise _refusal(f"this is {kind.name.replace('_', ' ')}")
    # DuckDB turns into JSON what reads, and says of the rest that it does not.
    ((serialized,),) = con.execute("select json_serialize_sql(?::varchar)", [text]).fetchall()
    try:
        tree = json.loads(serialized)
    except RecursionError:
        raise QueryError("The query is nested too deeply to be checked. Make it flatter.") from None
    if tree["error"] or len(tree["statements"]) != 1:
        raise _refusal("what is explained is not one")
    for node in _nodes(tree):
        kind_of_node = node.get("type")
        if isinstance(kind_of_node, str) and kind_of_node.endswith("_NODE"):
            if kind_of_node not in _READING:
                raise _refusal(f"it holds {kind_of_node.split('_')[0]}")
        elif kind_of_node == "TABLE_FUNCTION":
            name = str(node["function"].get("function_name", ""))
            if not _FUNCTIONS.fullmatch(name) and name.lower() not in _macros(con):
                raise QueryError(
                    f"{name}() cannot be used here: a query reads the views of the trace, and no "
                    "files. Table functions there are: range, generate_series, unnest, repeat."
                )


def _macros(con: duckdb.DuckDBPyConnection) -> set[str]:
    """Table macros that stand beside the views: ours, since nobody else can create one."""
    found = con.execute(
        "select lower(function_name) from duckdb_functions() "
        "where function_type = 'table_macro' and not internal"
    )
    return {name for (name,) in found.fetchall()}


def _lock(con: duckdb.DuckDBPyConnection, files: dict[str, RunFiles]) -> None:
    paths = [
        str(path.absolute())
        for run in files.values()
        for ranks in run.segments.values()
        for segments in ranks.values()
        for path in segments
    ] + [str(path.absolute()) for _, _, path in result_files(files)]
    # As the views name them, too: there, a [ stands in brackets.
    named = dict.fromkeys(text for p in paths for text in (literal(p), path_literal(p)))
    con.execute(f"set allowed_paths = [{', '.join(named)}]")
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")


def _run(
    con: duckdb.DuckDBPyConnection, text: str, seconds: float, rows: int
) -> tuple[pa.Table, float]:
    late = threading.Event()

    def cancel() -> None:
        late.set()
        con.interrupt()

    timer = threading.Timer(seconds, cancel)
    timer.daemon = True
    began = time.perf_counter()
    timer.start()
    try:
        table = con.sql(text).limit(rows + 1).to_arrow_table()
    except (duckdb.Error, RuntimeError) as e:  # an interrupt is a RuntimeError
        if late.is_set():
            raise QueryError(cancelled(seconds)) from e
        raise QueryError(str(e)) from e
    finally:
        timer.cancel()
    return table, time.perf_counter() - began


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _refusal(what: str) -> QueryError:
    return QueryError(
        f"Only a query that reads can be run here, and {what}. "
        "A query begins with SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN."
    )


def main(asked: BinaryIO, out: BinaryIO) -> None:
    """Answer what `locked.ask` wrote: a line of JSON, and the rows as an Arrow stream behind it."""
    given = json.load(asked)
    _bound_memory(given["memory"])
    try:
        table, took = run(**given)
    except MoeLensError as e:
        out.write(json.dumps({"error": str(e), "kind": type(e).__name__}).encode() + b"\n")
        return
    out.write(json.dumps({"seconds": took}).encode() + b"\n")
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)


def _bound_memory(memory: int) -> None:
    """Bound the address space to what is in use now, DuckDB's share, and as much again."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return  # not Linux: DuckDB's own bound has to do
    bound = pages * resource.getpagesize() + 2 * memory + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
