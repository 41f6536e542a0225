"""The views of a session: one per table of the trace, `moe_layers`, `runs`, and what was measured.

Data comes from `trace.reader` (files and open streams of one or several runs), and from the results
of replays and counterfactuals beside them, and goes into an in-memory DuckDB. This is the one place
where SQL is put together in Python, since DDL takes no parameters. What varies in it is paths and
names of runs and results, always through `literal` or `path_literal`, and names of tables, which
are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from moe_lens.errors import TraceError
from moe_lens.queries.about import experts_table, layers_table, runs_table
from moe_lens.queries.counterfactual import result_files
from moe_lens.queries.replayed import replay_rows
from moe_lens.trace.reader import RunFiles, superseded_from
from moe_lens.trace.rollup import straddles
from moe_lens.trace.schema import (
    BUCKET,
    COUNTERFACTUAL,
    LOAD_COARSE,
    REPLAY,
    REPLAY_EP,
    Table,
    with_keys,
)

_RANK = r"'rank=(\d+)/seg-\d+\.parquet$'"

_NOT_OVERTAKEN = (
    " where not exists (select 1 from _superseded s where s.run = t.run and s.rank = t.rank "
    "and s.attempt = t.attempt and t.{step} >= s.step)"
)

_SUMS = ", ".join(c.name for c in LOAD_COARSE.columns if c.packing == "split")

_MACROS = f"""
create or replace macro load_between(first, last) as table
select run, rank, last_step, phase, layer, tag, expert, {_SUMS} from load_coarse
where first is null and last is null
union all
select run, rank, step, phase, layer, tag, expert, {_SUMS} from load
where (first is not null or last is not null)
  and (first is null or step >= first) and (last is null or step <= last);

create or replace macro load_by_step(first, last, every) as table
select run, rank, first_step - first_step % every as step, phase, layer, tag, expert, {_SUMS}
from load_coarse
where first is null and last is null and every >= {BUCKET}
union all
select run, rank, step - step % every as step, phase, layer, tag, expert, {_SUMS} from load
where (first is not null or last is not null or every < {BUCKET})
  and (first is null or step >= first) and (last is null or step <= last);

create or replace macro one_in(every, step, forward, token) as
(step * 7919 + forward * 104729 + cast(token as bigint) * 15485863) % 2147483647 % every = 0;
"""  # noqa: S608
"""`load` for sums over steps: from the rollup where no single steps are asked for. And whether a
token is among those that are looked at, of so many one: the same in every layer."""


def create_views(con: duckdb.DuckDBPyConnection, runs: Mapping[str, RunFiles]) -> list[str]:
    """Create or replace the views over these runs (by name) and return the views' names.

    Raises:
        TraceError: A segment passed the reader's look at its ends, and still cannot be read.
    """
    superseded = _superseded(runs)
    _register(con, "_superseded", superseded)
    keys = dict.fromkeys(k for files in runs.values() for m in files.metas.values() for k in m.keys)
    tables = with_keys(tuple(keys))
    for table in tables.values():
        _register(con, f"_open_{table.name}", _open_rows(table, runs))
        try:
            con.execute(_view(table, runs, overtaken=superseded.num_rows > 0))
        except duckdb.Error as e:
            raise TraceError(f"{_places(runs)}: table {table.name} cannot be read: {e}") from e
    con.execute(_coarse_view(runs, overtaken=superseded.num_rows > 0))
    con.execute(_MACROS)
    for name, rows in (
        ("moe_layers", layers_table(runs)),
        ("moe_experts", experts_table(runs)),
        ("runs", runs_table(runs)),
        (REPLAY.name, replay_rows(runs)),
        (REPLAY_EP.name, replay_rows(runs, REPLAY_EP)),
    ):
        _register(con, f"_{name}", rows)
        con.execute(f"create or replace view {name} as select * from _{name}")  # noqa: S608
    shape = pa.schema([("run", pa.string()), ("result", pa.string()), *COUNTERFACTUAL.schema])
    _register(con, f"_{COUNTERFACTUAL.name}", shape.empty_table())
    con.execute(_counterfactual_view(runs))
    results = [REPLAY.name, REPLAY_EP.name, COUNTERFACTUAL.name]
    return [*tables, LOAD_COARSE.name, "moe_layers", "moe_experts", "runs", *results]


def literal(text: str) -> str:
    """A SQL string."""
    return "'" + text.replace("'", "''") + "'"


def path_literal(path: str) -> str:
    """A SQL string that DuckDB takes as this very file, whatever it is named.

    DuckDB globs even in a list of files: `run[1]` would also read `run1`. A character class of one
    character is that character.
    """
    return literal(re.sub(r"[\[*?]", lambda m: f"[{m[0]}]", path))


def _coarse_view(runs: Mapping[str, RunFiles], *, overtaken: bool) -> str:
    """`load_coarse`: rollups where there are some, and windows one by one where there are none."""
    columns = ", ".join(f.name for f in LOAD_COARSE.schema)
    alone = columns
    for name in ("window", "step"):
        alone = alone.replace(f"first_{name}, last_{name}", f'"{name}", "{name}"')
    parts = [f"select run, rank, {alone} from _open_load"]  # noqa: S608
    for name, files in runs.items():
        rolled: list[Path] = []
        single: list[Path] = []
        for rank in files.ranks("load"):
            superseded = superseded_from(files.metas[rank])
            coarse = {p.name: p for p in files.segments.get(LOAD_COARSE.name, {}).get(rank, [])}
            for path in files.segments.get("load", {}).get(rank, []):
                rollup = coarse.get(path.name)
                if rollup is None or (superseded and straddles(rollup, superseded)):
                    single.append(path)
                else:
                    rolled.append(rollup)
        for paths, which in ((rolled, columns), (single, alone)):
            if paths:
                parts.append(f"select run, rank, {which} from {_files(name, paths)}")  # noqa: S608
    names = ", ".join(["run", "rank", *LOAD_COARSE.schema.names])
    body = "\nunion all\n".join(parts)
    where = _NOT_OVERTAKEN.format(step="first_step") if overtaken else ""
    return (
        f"create or replace view {LOAD_COARSE.name} as\n"
        f"select * from ({body}) as t ({names}){where}"
    )


def _counterfactual_view(runs: Mapping[str, RunFiles]) -> str:
    """Every result, read where it lies: a row a token and change can be millions."""
    name = COUNTERFACTUAL.name
    columns = ", ".join(COUNTERFACTUAL.schema.names)
    parts = [f"select * from _{name}"]  # noqa: S608
    for run, result, path in result_files(runs):
        file = path_literal(str(path.absolute()))
        parts.append(
            f"select {literal(run)}, {literal(result)}, {columns} "  # noqa: S608
            f"from read_parquet({file}, hive_partitioning = false)"
        )
    body = "\nunion all\n".join(parts)
    return f"create or replace view {name} as\n{body}"


def _files(run: str, paths: list[Path]) -> str:
    """A table expression over segments of one run, with its name and the ranks."""
    listed = ", ".join(path_literal(str(p.absolute())) for p in paths)
    return (
        f"(select {literal(run)} as run, "  # noqa: S608
        f"cast(regexp_extract(filename, {_RANK}, 1) as integer) as rank, * "
        # A folder of the user's named x=y above the run must not become a column.
        f"from read_parquet([{listed}], union_by_name = true, hive_partitioning = false))"
    )


def _view(table: Table, runs: Mapping[str, RunFiles], *, overtaken: bool) -> str:
    # The open rows come first: they carry every column of the schema, so that a table without a
    # file is an empty view with the right columns, in the right order.
    parts = [f"select * from _open_{table.name}"]  # noqa: S608
    for name, files in runs.items():
        segments = files.segments.get(table.name, {})
        ranks = files.ranks(table.name)
        paths = [p for rank in ranks for p in segments.get(rank, [])]
        if paths:
            parts.append(f"select * from {_files(name, paths)}")  # noqa: S608
    body = "\nunion all by name\n".join(parts)
    if overtaken and any(c.name == "step" for c in table.columns):
        where = _NOT_OVERTAKEN.format(step="step")
        body = f"select * from ({body}) as t{where}"  # noqa: S608
    return f"create or replace view {table.name} as\n{body}"


def _open_rows(table: Table, runs: Mapping[str, RunFiles]) -> pa.Table:
    """Rows of the table's open streams, with `run` and `rank`; typed where there are none, too."""
    shape = pa.schema([("run", pa.string()), ("rank", pa.int32()), *table.schema])
    parts = [shape.empty_table()]
    for name, files in runs.items():
        streams = files.streams.get(table.name, {})
        for rank in files.ranks(table.name):
            if rank in streams:
                rows = streams[rank]
                where = pa.DictionaryArray.from_arrays(np.zeros(rows.num_rows, np.int8), [name])
                rows = rows.add_column(0, "run", where.cast(pa.string()))
                rows = rows.add_column(1, "rank", pa.array(np.full(rows.num_rows, rank, np.int32)))
                parts.append(rows)
    return pa.concat_tables(parts, promote_options="permissive")


def _superseded(runs: Mapping[str, RunFiles]) -> pa.Table:
    rows = list(_superseded_rows(runs))
    schema = pa.schema(
        [("run", pa.string()), ("rank", pa.int32()), ("attempt", pa.int32()), ("step", pa.int64())]
    )
    return pa.Table.from_pylist(rows, schema)


def _superseded_rows(runs: Mapping[str, RunFiles]) -> Iterator[dict[str, str | int]]:
    for name, files in runs.items():
        for rank, meta in files.metas.items():
            for attempt, step in superseded_from(meta).items():
                yield {"run": name, "rank": rank, "attempt": attempt, "step": step}


def _register(con: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    con.unregister(name)
    con.register(name, rows)


def _places(runs: Mapping[str, RunFiles]) -> str:
    return ", ".join(str(files.path) for files in runs.values())
