"""Segments: order, row groups, encodings, statistics; whole or not there at all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.events import Router, event, losses_event, seen
from support.reading import new_meta, read_rows

from moe_lens.trace import layout, segment
from moe_lens.trace.gather import lists
from moe_lens.trace.schema import TABLES
from moe_lens.trace.segment import ROW_GROUP, write_segment
from moe_lens.trace.writer import TraceWriter


def routing(steps: int, layers: list[int], tokens: int) -> pa.Table:
    """Rows as the writer appends them: by step, inside a step by layer."""
    n = tokens * len(layers) * steps
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "attempt": np.zeros(n, np.int32),
        "step": np.repeat(np.arange(steps, dtype=np.int64), tokens * len(layers)),
        "forward": np.zeros(n, np.int32),
        "layer": np.tile(np.repeat(np.array(layers, np.int32), tokens), steps),
        "token": np.tile(np.arange(tokens, dtype=np.int32), steps * len(layers)),
        "expert_ids": lists(rng.integers(0, 64, (n, 2), dtype=np.int32)),
        "weights": lists(rng.random((n, 2), dtype=np.float32)),
        "entropy": np.arange(n, dtype=np.float32),
    }
    schema = TABLES["routing"].schema
    arrays = [pa.array(columns[f.name]) if f.name in columns else pa.nulls(n, f.type)
              for f in schema]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=schema)


@pytest.fixture
def every_table(tmp_path: Path) -> Path:
    """A closed trace with rows in every table."""
    writer = TraceWriter(tmp_path, new_meta(keys=["prompt"]))
    known: set[int] = set()
    for step in range(4):
        model = [Router(n, 8, 2, capacity=2, logits=True) for n in (1, 0)]
        f = seen(model, step=step, lengths=(5, 5), first_sequence=2 * step, padding=0.1, seed=step,
                 losses=True, phase="train")  # fmt: skip
        writer.put(event(f, known=known))
        writer.put(losses_event(f))
    writer.close()
    assert {p.parent.parent.name for p in tmp_path.rglob("*.parquet")} == set(TABLES)
    return tmp_path


def test_rows_are_sorted_by_layer_and_otherwise_stay_in_order(tmp_path: Path) -> None:
    path = tmp_path / "seg-00000000.parquet"
    rows = routing(steps=3, layers=[0, 5, 2], tokens=4)
    write_segment(path, TABLES["routing"], rows)
    got = pq.read_table(path)
    keys = list(zip(*(got[c].to_pylist() for c in ("layer", "step", "token")), strict=True))
    assert keys == sorted(keys)
    assert set(got["entropy"].to_pylist()) == set(range(36))
    # each row still has its own values
    mine = {r["entropy"]: r for r in rows.to_pylist()}
    assert all(mine[r["entropy"]] == r for r in got.to_pylist())


def test_tables_without_layers_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "seg-00000000.parquet"
    schema = TABLES["outcomes"].schema
    sequences = random.Random(0).sample(range(1000), 1000)
    columns = {name: [0] * 1000 for name in schema.names}
    columns |= {"sequence": sequences, "kept": [None] * 1000, "loss": [0.0] * 1000}
    rows = pa.table(columns, schema=schema)
    write_segment(path, TABLES["outcomes"], rows)
    assert pq.read_table(path)["sequence"].to_pylist() == sequences


@pytest.mark.parametrize("layers", [[0, 1], [0]])
def test_row_groups_have_131072_rows(tmp_path: Path, layers: list[int]) -> None:
    assert ROW_GROUP == 131_072
    path = tmp_path / "seg-00000000.parquet"
    rows = routing(steps=2, layers=layers, tokens=100_000)
    write_segment(path, TABLES["routing"], rows)
    footer = pq.read_metadata(path)
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    assert sizes == [ROW_GROUP] * (len(sizes) - 1) + [rows.num_rows - ROW_GROUP * (len(sizes) - 1)]
    assert sum(sizes) == rows.num_rows
    layer = footer.schema.names.index("layer")
    highest = [footer.row_group(i).column(layer).statistics.max for i in range(len(sizes))]
    assert highest == sorted(highest)


def test_outcomes_have_row_groups_too(tmp_path: Path) -> None:
    path = tmp_path / "seg-00000000.parquet"
    n = ROW_GROUP + 1
    zeros = np.zeros(n, np.int32)
    columns = [zeros, zeros.astype(np.int64), zeros, np.arange(n), zeros, pa.nulls(n, pa.bool_()),
               np.zeros(n, np.float32)]  # fmt: skip
    schema = TABLES["outcomes"].schema
    write_segment(path, TABLES["outcomes"], pa.Table.from_arrays(columns, schema=schema))
    footer = pq.read_metadata(path)
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [ROW_GROUP, 1]


def test_encodings_and_statistics_are_those_of_the_format(every_table: Path) -> None:
    for name, table in TABLES.items():
        (path,) = layout.segments(every_table, name, 0).values()
        group = pq.read_metadata(path).row_group(0)
        for i in range(group.num_columns):
            column = group.column(i)
            key = column.path_in_schema.split(".")[0]
            where = f"{name}.{key}"
            assert column.compression == "ZSTD", where
            packing = next((c.packing for c in table.columns if c.name == key), "dictionary")
            if packing == "split":
                assert "BYTE_STREAM_SPLIT" in column.encodings, where
                assert not column.has_dictionary_page, where
                assert not column.is_stats_set, where
            elif column.physical_type != "BOOLEAN":  # Parquet has no dictionary of booleans
                assert column.has_dictionary_page, where
                assert not {"BYTE_STREAM_SPLIT", "PLAIN_DICTIONARY"} & set(column.encodings), where
            if packing == "dictionary" and "." not in column.path_in_schema and key != "prompt":
                assert column.is_stats_set, where


@pytest.mark.parametrize(
    ("table", "split"),
    [
        (
            "routing",
            {"token", "expert_ids", "weights", "next_ids", "next_weights", "entropy", "margin"}
            | {"router_ids", "group_entropy"},
        ),
        ("logits", {"token", "logits"}),
        ("outcomes", {"position", "loss"}),
        ("tokens", {"token", "position", "token_id"}),
    ],
)
def test_ids_and_floats_of_tokens_are_split_by_byte(table: str, split: set[str]) -> None:
    assert {c.name for c in TABLES[table].columns if c.packing == "split"} == split


def test_only_types_that_spark_reads_and_no_arrow_schema(every_table: Path) -> None:
    plain = {pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_(), pa.string()}
    for path in every_table.rglob("*.parquet"):
        footer = pq.read_metadata(path)
        assert b"ARROW:schema" not in (footer.metadata or {})
        for f in pq.read_schema(path):
            bare = f.type.value_type if pa.types.is_list(f.type) else f.type
            assert bare in plain, f"{path} {f}"
        logical = {footer.schema.column(i).logical_type.type for i in range(footer.num_columns)}
        assert logical <= {"NONE", "STRING"}, path


def test_duckdb_and_pandas_read_every_table(every_table: Path) -> None:
    for name in TABLES:
        (path,) = layout.segments(every_table, name, 0).values()
        want = read_rows(every_table, name)
        duck = duckdb.sql(f"FROM read_parquet('{path}')").to_arrow_table()
        assert set(duck["rank"].to_pylist()) == {0}  # from the name of the folder
        duck = duck.drop_columns("rank")
        assert duck.column_names == list(want[0])
        np.testing.assert_equal(duck.to_pylist(), want)  # NaN equals NaN in `logits`
        frame = pd.read_parquet(path)
        assert list(frame.columns) == list(want[0])
        assert len(frame) == len(want)
        for column in ("step", "layer", "expert", "sequence"):
            if column in frame:
                assert frame[column].tolist() == [r[column] for r in want]


@pytest.mark.parametrize("fails_in", ["open", "write", "sync", "rename"])
def test_a_failed_write_leaves_no_file_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    if fails_in == "open":
        monkeypatch.setattr(segment, "open_parquet", refuse)
    elif fails_in == "write":
        monkeypatch.setattr(pq.ParquetWriter, "write_table", refuse)
    elif fails_in == "sync":
        monkeypatch.setattr("os.fsync", refuse)
    else:
        monkeypatch.setattr(Path, "replace", refuse)
    path = tmp_path / "routing" / "rank=0" / "seg-00000000.parquet"
    with pytest.raises(OSError, match="No space left"):
        write_segment(path, TABLES["routing"], routing(1, [0], 10))
    assert list(path.parent.iterdir()) == []


def test_nothing_has_the_segments_name_before_it_is_whole_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rank=0" / "seg-00000007.parquet"
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(segment, "_sync", lambda p: synced.append((p.name, path.exists())))
    write_segment(path, TABLES["routing"], routing(1, [0], 10))
    # The temporary file is synced, then it has its name, then the folder is synced.
    assert synced == [(".seg-00000007.tmp", False), ("rank=0", True)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
