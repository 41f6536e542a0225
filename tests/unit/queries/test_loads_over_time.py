"""Counts of every expert over time, against a plain loop."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.asking import EXPERTS, ask, choices, kept, narrowed, relaxed, trace_of
from support.traces import Rows


@relaxed
@given(
    load=st.lists(choices(), max_size=40), narrow=narrowed, every=st.sampled_from([1, 2, 3, 100])
)
def test_loads_over_time(load: Rows, narrow: dict[str, Any], every: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with trace_of(Path(folder), load=load) as trace:
            asked = {**narrow, "every": every}
            got = ask(trace, "loads_over_time", asked, "step", "layer", "expert")
    wanted: Counter[tuple[int, int, int]] = Counter()
    for row in kept(load, narrow):
        if row["expert"] < EXPERTS[row["layer"]] and row["routed"]:
            bucket = row["step"] // every * every
            wanted[bucket, row["layer"], row["expert"]] += row["routed"]
    assert {key: row["routed"] for key, row in got.items()} == dict(wanted)
    assert list(got) == sorted(got)
