"""Folders of the laboratory: found, read, and refused in a line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.laboratories import made_up
from support.traces import write_run

from moe_lens.errors import TraceError
from moe_lens.granularity import findings
from moe_lens.queries.laboratory import laboratories, laboratory


def test_what_was_written_is_read(tmp_path: Path) -> None:
    plan, rows = made_up(tmp_path / "it's [a] lab")
    found = laboratory(tmp_path / "it's [a] lab")
    assert found.missing == 0
    assert (found.about["preset"], found.about["kind"], found.about["hidden"]) == (
        plan.preset, plan.kind, plan.hidden,
    )  # fmt: skip
    by_name = {r.name: asdict(r) for r in rows}
    for record in found.students.to_dict("records"):
        expected = by_name[record["name"]]
        assert record == {k: expected[k] for k in record}
    assert set(expected) - set(record) == {"gate", "gate_bias_values"}
    assert len(found.table("pictures")) == 32
    assert found.table("regions")["regions"].tolist() == [18, 26, 24, 22]


@pytest.mark.parametrize("preset", ["quick", "constant", "paper"])
@pytest.mark.parametrize("finished", [None, 0, 5])
def test_its_rows_make_the_tables_that_the_laboratory_made(
    tmp_path: Path, preset: str, finished: int | None
) -> None:
    plan, rows = made_up(tmp_path, preset, finished=finished, seed=1)
    found = laboratory(tmp_path)
    assert findings.gap(found, found.rows()) == findings.gap(plan, rows)
    assert findings.sweeps(found, found.rows()) == findings.sweeps(plan, rows)
    assert len(found.rows()) == len(rows)


def test_an_unfinished_one_says_how_many_are_missing(tmp_path: Path) -> None:
    plan, _ = made_up(tmp_path, finished=3)
    found = laboratory(tmp_path)
    assert found.missing == len(plan.runs) - 3
    assert found.table("regions").empty


def test_laboratories_are_found_at_below_and_above(tmp_path: Path) -> None:
    place = tmp_path / "place"
    write_run(place / "run", steps=1)
    pq.write_table(pa.table({"a": [1]}), place / "run" / "results.parquet")  # somebody else's
    assert laboratories(place) == []
    made_up(place / "deep" / "b", finished=0)
    made_up(place / "a", finished=1)
    write_run(place / "a" / "routing", steps=1)
    assert laboratories(place) == [place / "a", place / "deep" / "b"]
    assert laboratories(place / "a") == laboratories(place / "a" / "routing") == [place / "a"]
    assert laboratories(place / "run") == []
    assert laboratories(place / "not there") == []


@pytest.mark.parametrize("what", ["cut", "foreign", "older", "no students"])
def test_damage_is_said_in_a_line(tmp_path: Path, what: str) -> None:
    made_up(tmp_path)
    path = tmp_path / "results.parquet"
    table = pq.read_table(path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif what == "foreign":
        pq.write_table(table.replace_schema_metadata({}), path)
    elif what == "older":
        pq.write_table(table.drop_columns(["nmse_min"]), path)
    else:
        pq.write_table(table.replace_schema_metadata({b"moe_lens.lab": b"[]"}), path)
    with pytest.raises(TraceError) as caught:
        laboratory(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_table_beside_the_results(tmp_path: Path) -> None:
    made_up(tmp_path)
    (tmp_path / "regions.parquet").write_bytes(b"PAR1")
    with pytest.raises(TraceError, match=r"regions\.parquet is not a result of moe-lens lab"):
        laboratory(tmp_path).table("regions")


def test_a_damaged_laboratory_is_still_listed_so_that_a_page_can_say_so(tmp_path: Path) -> None:
    made_up(tmp_path / "lab")
    write_run(tmp_path / "lab" / "routing", steps=1)
    (tmp_path / "lab" / "results.parquet").write_bytes(b"PAR1")
    assert laboratories(tmp_path) == [tmp_path / "lab"]
