"""`Trace`: what its views hold, over ranks, runs, attempts and open streams."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest
from support.traces import arrow, layer_info, meta, segment, stream, write_run

from moe_lens.errors import QueryError, TraceError
from moe_lens.queries.session import open_trace
from moe_lens.trace import layout
from moe_lens.trace.meta import Attempt, write_meta
from moe_lens.trace.schema import TABLES


def steps(*numbers: int, attempt: int = 0) -> list[dict[str, int]]:
    return [{"attempt": attempt, "step": n, "tokens": 10} for n in numbers]


def test_a_view_is_what_was_written_sealed_or_not(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run1", ranks=(0, 1), world=2, open_tables=tuple(TABLES))
    with open_trace(tmp_path / "run1") as trace:
        for name in ("load", "layers", "routers", "slices", "steps", "tokens", "routing"):
            columns = TABLES[name].schema.names
            got = trace.table(name).arrow()
            assert got.column_names == ["run", "rank", *columns]
            assert set(got["run"].to_pylist()) == {"run1"}
            expected = arrow(name, written.rows[name]).to_pylist()
            ranks = [r["rank"] for r in written.rows[name]]

            def key(row: dict, names: tuple[str, ...] = ("rank", *columns)) -> str:
                return repr([row[c] for c in names])

            whole = [{"rank": r, **row} for r, row in zip(ranks, expected, strict=True)]
            seen = [{k: row[k] for k in ("rank", *columns)} for row in got.to_pylist()]
            assert sorted(map(key, seen)) == sorted(map(key, whole))


def test_a_table_without_a_file_is_an_empty_view_with_the_right_columns(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(keys=["site"]))
    with open_trace(tmp_path) as trace:
        for name, table in TABLES.items():
            got = trace.table(name)
            assert len(got) == 0
            names = ["run", "rank", *table.schema.names]
            assert got.columns == ([*names, "site"] if name == "sequences" else names)
        for name in trace.questions():
            trace.query(name)  # none of them may stumble over nothing
        assert trace.info().runs[0].tokens == 0


def test_columns_added_later_are_null_before(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    path = segment(tmp_path, "steps", steps(0))
    import pyarrow.parquet as pq

    old = pq.read_table(path).drop_columns(["device_ns"])
    pq.write_table(old, path, store_schema=False)
    segment(tmp_path, "steps", [{"step": 1, "device_ns": 5}], seq=1)
    with open_trace(tmp_path) as trace:
        got = trace.sql("select step, device_ns from steps order by step").rows()
    assert got == [{"step": 0, "device_ns": None}, {"step": 1, "device_ns": 5}]


@pytest.mark.parametrize(
    "name",
    ["with space", "it's", 'a "quoted" one', "run[1]", "run*", "run?", "[ab]", "key=7",
     "back\\slash", "ünïcode", "a;b--c", "run=3", "{x}"],
)  # fmt: skip
def test_any_folder_name_is_that_folder_alone(tmp_path: Path, name: str) -> None:
    # Neighbours that a glob would read too.
    for other in ("run1", "runs", "a", "b"):
        write_meta(tmp_path / other, meta())
        segment(tmp_path / other, "steps", steps(100, 101, 102))
    run = tmp_path / name
    write_meta(run, meta())
    segment(run, "steps", steps(1, 2))
    stream(run, "steps", steps(3), seq=1)
    with open_trace(run) as trace:
        got = trace.sql("select run, rank, step from steps order by step").rows()
    assert got == [{"run": name, "rank": 0, "step": n} for n in (1, 2, 3)]


def test_several_runs_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    for name in ("x/run", "y/run"):
        write_meta(tmp_path / name, meta(run_id=name))
        segment(tmp_path / name, "steps", steps(1))
    with open_trace([tmp_path / "x/run", tmp_path / "y/run"]) as trace:
        assert trace.runs == ["x/run", "y/run"]
        assert [r["run"] for r in trace.query("capture_health").rows()] == ["x/run", "y/run"]
        assert [r.run for r in trace.info().runs] == ["x/run", "y/run"]


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    with pytest.raises(TraceError, match="given twice"):
        open_trace([tmp_path, tmp_path / "." / "../" / tmp_path.name])
    with pytest.raises(TraceError, match="No path given"):
        open_trace([])


def test_a_later_attempt_overtakes_the_steps_it_repeats(tmp_path: Path) -> None:
    attempts = [Attempt(0, 0, first_step=0), Attempt(1, 1, first_step=2)]
    write_meta(tmp_path, meta(0, world=2, attempts=attempts))
    write_meta(tmp_path, meta(1, world=2))  # this rank was never resumed
    segment(tmp_path, "steps", steps(0, 1, 2, 3))
    segment(tmp_path, "steps", steps(2, 3, attempt=1), seq=1)
    stream(tmp_path, "steps", steps(4, attempt=1), seq=2)
    segment(tmp_path, "steps", steps(0, 1, 2, 3), rank=1)
    segment(tmp_path, "outcomes", [{"sequence": 9, "loss": 1.0}])
    with open_trace(tmp_path) as trace:
        got = trace.sql("select rank, attempt, step from steps order by all").rows()
        assert [tuple(r.values()) for r in got] == [
            (0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 4),
            (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 0, 3),
        ]  # fmt: skip
        assert len(trace.table("outcomes")) == 1
        assert trace.info().runs[0].attempts == 2


def test_counts_of_copies_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, ranks=(0,), world=2)
    segment(tmp_path, "load", [{"routed": 10**6}], rank=1)
    segment(tmp_path, "routing", [{"step": 0}], rank=1)
    write_meta(tmp_path, meta(1, world=2, counts="copy"))
    with open_trace(tmp_path) as trace:
        assert trace.sql("select distinct rank from load").rows() == [{"rank": 0}]
        assert len(trace.sql("select distinct rank from routing")) == 2


def test_refresh_sees_what_came_since(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    segment(tmp_path, "steps", steps(0))
    with open_trace(tmp_path) as trace:
        stream(tmp_path, "steps", steps(1, 2), seq=1)
        assert len(trace.table("steps")) == 1  # as it was when opened
        trace.refresh()
        assert len(trace.table("steps")) == 3


def test_a_segment_pruned_since_is_no_error(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    oldest = segment(tmp_path, "steps", steps(0))
    segment(tmp_path, "steps", steps(1), seq=1)
    with open_trace(tmp_path) as trace:
        oldest.unlink()
        assert trace.sql("select step from steps").rows() == [{"step": 1}]


def test_a_segment_damaged_inside_is_a_trace_error(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    path = segment(tmp_path, "steps", steps(*range(100)))
    data = bytearray(path.read_bytes())
    data[-400:-8] = bytes(392)  # the footer's text; both ends are as they should be
    path.write_bytes(data)
    with pytest.raises(TraceError, match="table steps cannot be read"):
        open_trace(tmp_path)


def test_the_layers_of_all_ranks_once(tmp_path: Path) -> None:
    write_meta(tmp_path, meta(0, world=2, layers=[layer_info(0), layer_info(1)]))
    write_meta(tmp_path, meta(1, world=2, layers=[layer_info(1), layer_info(2, experts=4)]))
    with open_trace(tmp_path) as trace:
        got = trace.sql("select layer, rank, experts, path from moe_layers order by layer").rows()
        assert [(r["layer"], r["rank"], r["experts"]) for r in got] == [
            (0, 0, 8),
            (1, 0, 8),
            (2, 1, 4),
        ]
        assert trace.sql("select rank, counts, world from runs order by rank").rows()[1] == {
            "rank": 1, "counts": "own", "world": 2,
        }  # fmt: skip


def test_info(tmp_path: Path) -> None:
    run = tmp_path / "run1"
    write_run(
        run, ranks=(0, 2), world=3, steps=4, tokens=32, open_tables=("load",),
        warnings={"something odd": 2}, never_entered=["model.layers.9"], pruned={"routing": 7},
    )  # fmt: skip
    with open_trace(run) as trace:
        info = trace.info()
    (about,) = info.runs
    assert about.shape == "2 layers × 8 experts × top-2"
    assert (about.ranks, about.missing_ranks) == ([0, 2], [1])
    assert (about.steps, about.forwards, about.tokens, about.padding_tokens) == (4, 8, 256, 24)
    assert about.phases == ["train", "eval"]
    assert about.token_rows == 256
    assert (about.fires_seen, about.fires_expected, about.lost_rows) == (16, 16, 0)
    assert about.warnings == {"something odd": 4}
    assert about.pruned == {"routing": 14}
    assert about.unfinished
    assert about.bytes["load"] > 0
    text = repr(info)
    for expected in ("missing ranks", "model.layers.9", "something odd (4×)", "open, last written"):
        assert expected in text


def test_info_tells_damaged_segments(tmp_path: Path) -> None:
    write_run(tmp_path)
    segment(tmp_path, "load", [{}], seq=1).write_bytes(b"")
    with open_trace(tmp_path, skip_damaged=True) as trace:
        (path,) = trace.info().runs[0].damaged
        assert path.endswith("seg-00000001.parquet")
        assert "empty (0 bytes)" in repr(trace.info())


def test_results(tmp_path: Path) -> None:
    write_run(tmp_path)
    with open_trace(tmp_path) as trace:
        got = trace.sql("select layer, sum(routed) as n from load group by layer order by layer")
        assert isinstance(got.df(), pd.DataFrame)
        assert got.df()["n"].dtype == "int64"  # DuckDB sums into 128 bits
        assert isinstance(got.arrow(), pa.Table)
        assert repr(got).splitlines()[0].split() == ["layer", "n"]
        assert "<th>layer</th>" in got._repr_html_()
        assert "more rows" in repr(trace.table("load"))
        big = trace.sql("select 170141183460469231731687303715884105727 as huge, 'a<b' as t")
        assert str(big.rows()[0]["huge"]).startswith("1701411834604692317")
        assert "a&lt;b" in big._repr_html_()
        assert len(trace.sql("")) == 0
        assert trace.sql("select $x + 1 as y", x=2).rows() == [{"y": 3}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("selct 1", r"syntax error at or near \"selct\"\nLINE 1: selct 1\nViews: load"),
        (
            "select * from laod",
            r"Table with name laod does not exist!\n.*Did you mean load\?\nViews",
        ),
        ("select routd from load", r"\"routd\" not found.*\nCandidate bindings: .*\"routed\""),
        ("select 1 // 0", "Division by zero"),
        ("select $x", "Values were not provided for the following parameters: x"),
        ("select cast('abc' as integer)", "Could not convert string 'abc'"),
        ("select * from 's3://bucket/x.parquet'", "httpfs"),
        ("select " + "1 + " * 100 + "from load", "LINE 1: …"),
    ],
)
def test_a_mistake_in_sql_is_explained(tmp_path: Path, text: str, says: str) -> None:
    write_meta(tmp_path, meta())
    with open_trace(tmp_path) as trace, pytest.raises(QueryError, match=f"(?s){says}") as error:
        trace.sql(text)
    assert len(str(error.value).splitlines()) <= 4
    assert isinstance(error.value.__cause__, duckdb.Error)


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    with (
        open_trace(tmp_path) as trace,
        pytest.raises(QueryError, match=r"no view 'x'\. Views: load"),
    ):
        trace.table("x")


def test_a_closed_trace_says_so(tmp_path: Path) -> None:
    write_meta(tmp_path, meta())
    trace = open_trace(tmp_path)
    trace.close()
    trace.close()
    assert "closed" in repr(trace)
    with pytest.raises(TraceError, match="was closed"):
        trace.sql("select 1")


def test_nothing_is_written(tmp_path: Path) -> None:
    write_run(tmp_path, open_tables=("load",))
    lock = layout.lock_path(tmp_path, 0)
    lock.touch()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with open_trace(tmp_path) as trace:
        trace.info()
        for name in trace.questions():
            trace.query(name)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
