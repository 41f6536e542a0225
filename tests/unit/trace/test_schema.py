"""The tables of trace format 1: complete, of plain types, with keys that can be told apart."""

from __future__ import annotations

import pyarrow as pa
import pytest

from moe_lens.trace.schema import TABLES, Table, with_keys

every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())


def test_the_tables_are_those_of_the_format() -> None:
    assert set(TABLES) == {
        *("load", "layers", "routers", "slices", "steps"),
        *("sequences", "tokens", "routing", "outcomes", "logits"),
    }
    assert all(name == table.name for name, table in TABLES.items())


def test_a_disk_bound_may_remove_rows_of_tokens_and_no_counts() -> None:
    bounded = {name for name, table in TABLES.items() if table.per_token}
    assert bounded == {"tokens", "routing", "outcomes", "logits"}


@every_table
def test_columns_are_named_once_documented_and_packed_one_of_two_ways(table: Table) -> None:
    names = [c.name for c in table.columns]
    assert len(set(names)) == len(names)
    assert names[0] == "attempt"
    assert "run" not in names  # keys of the views
    assert "rank" not in names
    assert table.row
    for c in table.columns:
        assert c.doc, c.name
        assert c.packing in ("dictionary", "split"), c.name


@every_table
def test_types_are_signed_plain_and_lists_of_those(table: Table) -> None:
    plain = {pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.bool_()}
    for f in table.schema:
        assert (f.type.value_type if pa.types.is_list(f.type) else f.type) in plain, f


@every_table
def test_floats_and_lists_of_numbers_are_split_by_byte(table: Table) -> None:
    for c in table.columns:
        bare = c.type.value_type if pa.types.is_list(c.type) else c.type
        if pa.types.is_floating(bare) or c.name in ("expert_ids", "next_ids"):
            assert c.packing == "split", c.name
        if pa.types.is_string(bare) or pa.types.is_boolean(bare):
            assert c.packing == "dictionary", c.name


@every_table
def test_rows_are_sorted_by_columns_that_are_never_null(table: Table) -> None:
    columns = {c.name: c for c in table.columns}
    for name in table.sort:
        # a loss of a whole sequence has no position
        assert not columns[name].nullable or (table.name, name) == ("outcomes", "position")
    if "layer" in columns:
        assert table.sort[0] == "layer"


def test_a_number_that_a_router_may_lack_can_be_null() -> None:
    nullable = {
        name: {c.name for c in table.columns if c.nullable} for name, table in TABLES.items()
    }
    sums = {"entropy_sum", "margin_sum", "top1_prob_sum", "zloss_sum", "group_entropy_sum"}
    assert nullable["routers"] == sums
    assert {"prob_sum", "received"} <= nullable["load"]
    optional = {"weights", "next_ids", "next_weights", "entropy", "margin", "dropped", "router_ids"}
    assert nullable["routing"] == {*optional, "group_entropy"}
    counts = {"routed", "processed", "overflowed", "dropped", "rerouted_in", "padding"}
    assert not nullable["load"] & counts
    assert nullable["steps"] == {"t_start_ns", "host_ns", "device_ns"}


def test_the_users_keys_follow_the_columns_of_sequences_and_change_no_other_table() -> None:
    assert with_keys(()) == TABLES
    tables = with_keys(("source", "split"))
    base = TABLES["sequences"]
    assert tables["sequences"].columns[: len(base.columns)] == base.columns
    extra = tables["sequences"].columns[len(base.columns) :]
    assert [(c.name, c.type, c.nullable) for c in extra] == [
        ("source", pa.string(), True),
        ("split", pa.string(), True),
    ]
    assert tables["sequences"].per_token == base.per_token
    assert all(tables[name] is TABLES[name] for name in TABLES if name != "sequences")
