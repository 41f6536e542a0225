"""SQL that somebody typed, run where it can only read the views of a trace, and for how long.

It runs in a process of its own (`fenced`): a query can need more memory than there is, or be deaf
to an interrupt for minutes, and must not take a server along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from moe_lens.errors import QueryError, TraceError
from moe_lens.queries.fenced import cancelled
from moe_lens.queries.result import Result

ROWS = 100_000
"""Rows of an answer that are fetched, if nothing else is asked for."""

SECONDS = 30.0
"""Time after which a query is cancelled, if nothing else is asked for."""

MEMORY = 2 * 10**9
"""Bytes that DuckDB may use, if nothing else is asked for."""

_MORE_SECONDS = 10.0
"""For the process to start, and to end by itself when its query was interrupted."""


@dataclass(frozen=True)
class Answer:
    """What a query gave."""

    result: Result
    complete: bool
    """False: there were more rows than were fetched."""
    seconds: float
    """That the query took."""


def ask(
    paths: Iterable[str | Path],
    text: str,
    *,
    seconds: float = SECONDS,
    rows: int = ROWS,
    memory: int = MEMORY,
    skip_damaged: bool = False,
) -> Answer:
    """Run one query that reads, over the views of these runs.

    Args:
        paths: Folders of runs.
        text: SQL: SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW, or EXPLAIN of these.
        seconds: Time after which it is cancelled.
        rows: Rows that are fetched at most.
        memory: Bytes that DuckDB may use; the process gets some more.
        skip_damaged: Leave out segments that cannot be read.

    Raises:
        QueryError: Not such a query, or DuckDB's message, or it took too long or too much memory.
        TraceError: A run cannot be read.
    """
    given = {
        "paths": [str(Path(p).absolute()) for p in paths],
        "text": text,
        "seconds": seconds,
        "rows": rows,
        "memory": memory,
        "skip_damaged": skip_damaged,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "moe_lens.queries.fenced"],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=seconds + _MORE_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired as e:
        raise QueryError(cancelled(seconds)) from e
    head, _, rest = done.stdout.partition(b"\n")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = last[0] if last else f"its process ended with code {done.returncode}"
        raise QueryError(
            f"The query was ended, most likely for needing more than {memory / 1e9:g} GB of "
            f"memory ({why}). Ask for less at a time."
        )
    said = json.loads(head)
    if "error" in said:
        raise (TraceError if said["kind"] == "TraceError" else QueryError)(said["error"])
    table = pa.ipc.open_stream(rest).read_all()
    return Answer(Result(table.slice(0, rows)), table.num_rows <= rows, float(said["seconds"]))
