"""Taking rows by index gives what pyarrow's own take gives, for every kind of column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.trace.gather import Gather, lists

KINDS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int": (pa.int32(), st.integers(-5, 5)),
    "float": (pa.float32(), st.floats(width=32, allow_nan=False)),
    "bool": (pa.bool_(), st.booleans()),
    "string": (pa.string(), st.sampled_from(["a", "bb", ""])),
    "pairs": (pa.list_(pa.int32()), st.lists(st.integers(0, 9), min_size=2, max_size=2)),
    "ragged": (pa.list_(pa.float32()), st.lists(st.just(0.5), max_size=3)),
    "empty": (pa.list_(pa.int32()), st.just([])),
}


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    n = draw(st.integers(0, 8))
    columns: dict[str, pa.Array] = {}
    for name, (type_, values) in KINDS.items():
        for nulls, kind in (("", values), ("_or_null", st.none() | values), ("_null", st.none())):
            drawn = draw(st.lists(kind, min_size=n, max_size=n))
            columns[name + nulls] = pa.array(drawn, type_)
    table = pa.table(columns)
    cut = draw(st.integers(0, n))
    if draw(st.booleans()):  # chunks that are slices of something longer
        table = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    return table.slice(draw(st.integers(0, n)))


@settings(max_examples=40, deadline=None)
@given(tables(), st.data())
def test_takes_what_pyarrow_takes(table: pa.Table, data: st.DataObject) -> None:
    n = table.num_rows
    gather = Gather(table)
    for _ in range(2):  # a gather serves many times
        order = data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)) if n else []
        got = gather.take(np.array(order, np.int64))
        got.validate(full=True)
        assert got.schema == table.schema
        assert got.to_pylist() == [table.to_pylist()[i] for i in order]


def test_chunks_of_lists_of_different_lengths_are_not_cut_at_one_length() -> None:
    wide = pa.table({"ids": pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.int32()))})
    narrow = pa.table({"ids": pa.array([[7], [8], [9]], pa.list_(pa.int32()))})
    both = pa.concat_tables([wide, narrow])
    got = Gather(both).take(np.array([4, 0, 2]))
    assert got["ids"].to_pylist() == [[9], [1, 2, 3], [7]]


def test_lists_are_the_rows_of_a_rectangle() -> None:
    values = np.arange(6, dtype=np.int32).reshape(3, 2)
    assert lists(values).to_pylist() == [[0, 1], [2, 3], [4, 5]]
    assert lists(values[:, ::-1]).to_pylist() == [[1, 0], [3, 2], [5, 4]]
    assert lists(values[:0]).to_pylist() == []
    assert lists(values[:, :0]).to_pylist() == [[], [], []]
    assert lists(values).type == pa.list_(pa.int32())
