"""Traces that were written before a column was added: opened, asked, sealed, and gone on with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import moe_lens
from moe_lens.trace import layout
from moe_lens.trace.recover import recover
from moe_lens.trace.schema import TABLES
from moe_lens.trace.store import seal_stream
from moe_lens.trace.stream import OpenStream

NEW = {"routers": "group_entropy_sum", "routing": "group_entropy"}
"""What the version before did not have."""
GROUPS, E, K = 4, 12, 2


def record(run: Path, steps: int, *, resume: bool = False) -> None:
    generator = torch.Generator().manual_seed(steps)
    with moe_lens.record(None, run, tokens=1.0, resume=resume) as rec:
        for _ in range(steps):
            with rec.step(phase="train"):
                logits = torch.randn(20, E, generator=generator)
                weights, ids = logits.softmax(-1).topk(K)
                rec.log("x", ids, weights, logits, groups=GROUPS, top_groups=GROUPS)


def age(run: Path, *, sealed: bool) -> None:
    """Make of a run what the version before would have written of it."""
    for table, column in NEW.items():
        for seq, path in layout.segments(run, table, 0).items():
            rows = pq.read_table(path).drop_columns([column])
            if sealed:
                pq.write_table(rows, path)
                continue
            old = pa.schema([f for f in TABLES[table].schema if f.name != column])
            stream = OpenStream(layout.stream_path(run, table, 0, seq), old)
            stream.append(pa.Table.from_batches(rows.cast(old).to_batches(), old))
            stream.close()
            path.unlink()


def entropies(run: Path) -> tuple[dict[str, object], list[object]]:
    with moe_lens.open(run) as trace:
        (row,) = trace.query("group_entropy").rows()
        rows = trace.sql("select group_entropy from routing order by step, token").rows()
        assert trace.sql("select count(entropy) n from routing").rows()[0]["n"] == len(rows)
        trace.query("expert_sets").rows()
    # DuckDB adds in the order in which threads finish.
    rounded = {k: round(v, 12) if isinstance(v, float) else v for k, v in row.items()}
    return rounded, [r["group_entropy"] for r in rows]


@pytest.mark.parametrize("sealed", [True, False], ids=["segments", "streams"])
def test_a_trace_without_the_columns_opens_and_they_are_null(tmp_path: Path, sealed: bool) -> None:
    run = tmp_path / "run"
    record(run, 3)
    new, kept = entropies(run)
    assert None not in kept
    age(run, sealed=sealed)
    old, lost = entropies(run)
    assert lost == [None] * 60
    assert old == new | {"token_group": None, "token_within": None}


def test_what_a_dead_writer_of_the_version_before_left_is_sealed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record(run, 3)
    age(run, sealed=False)
    before, _ = entropies(run)
    assert {(r.table, r.rows) for r in recover(run)} == {("routers", 3), ("routing", 60)}
    assert layout.streams(run, 0) == {}
    assert entropies(run) == (before, [None] * 60)
    (path,) = layout.segments(run, "routing", 0).values()
    assert pq.read_schema(path).names == TABLES["routing"].schema.names


@pytest.mark.parametrize("sealed", [True, False], ids=["segments", "streams"])
def test_a_run_of_the_version_before_goes_on(tmp_path: Path, sealed: bool) -> None:
    """Means are of the windows that know both entropies; the chain rule holds of these."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    record(run, 3)
    age(run, sealed=sealed)
    record(run, 2, resume=True)
    record(alone, 2)
    row, rows = entropies(run)
    only, expected = entropies(alone)
    assert rows == [None] * 60 + expected
    assert row["tokens"] == 100
    for name in ("token_group", "token_within"):
        assert row[name] == pytest.approx(only[name])


def test_a_column_that_is_never_null_is_not_made_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record(run, 1)
    path = layout.segments(run, "routing", 0)[0]
    rows = pq.read_table(path).drop_columns(["expert_ids"])
    path.unlink()
    schema = pa.schema([f for f in TABLES["routing"].schema if f.name != "expert_ids"])
    stream = OpenStream(layout.stream_path(run, "routing", 0, 0), schema)
    stream.append(rows.cast(schema))
    stream.close()
    with pytest.raises(KeyError, match="expert_ids"):
        seal_stream(run, TABLES["routing"], 0, 0)
    shutil.rmtree(run)
