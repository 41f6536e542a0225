"""Generated rows of counts, and what tests of stored questions share: ask, and narrow by hand.

Two ranks, of which each has half of its rows sealed and half in an open stream. Layer 2 has one
expert, layer 3 never ran, and layers 0 and 1 have zero-compute experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.traces import Rows, layer_info, meta, segment, stream

from moe_lens.queries.catalog import question
from moe_lens.queries.session import Trace, open_trace
from moe_lens.trace.meta import LayerInfo, write_meta

EXPERTS, ZERO = (6, 6, 1, 4), (2, 2, 0, 0)
LAYERS, RAN = len(EXPERTS), 3
STEPS, RANKS = 4, 2
PHASES, TAGS = ("train", "eval"), ("code", "prose", "it's $tag")

relaxed = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

small = st.integers(0, 5)

narrowed = st.fixed_dictionaries(
    {},
    optional={
        "first_step": st.integers(0, STEPS - 1),
        "last_step": st.integers(0, STEPS - 1),
        "phase": st.sampled_from(PHASES),
        "tag": st.sampled_from(TAGS),
        "rank": st.integers(0, RANKS - 1),
        "first_layer": st.integers(0, LAYERS - 1),
        "last_layer": st.integers(0, LAYERS - 1),
    },
)
"""Every standard filter, each given or not."""


@st.composite
def keys(draw: st.DrawFn, *names: str) -> dict[str, Any]:
    """Where a row of counts stands; `names` of layer, tag."""
    row: dict[str, Any] = {
        "rank": draw(st.integers(0, RANKS - 1)),
        "step": draw(st.integers(0, STEPS - 1)),
        "phase": draw(st.sampled_from(PHASES)),
    }
    if "layer" in names:
        row["layer"] = draw(st.integers(0, RAN - 1))
    if "tag" in names:
        row["tag"] = draw(st.sampled_from(TAGS))
    return row


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """A row of `load` that keeps the invariants."""
    where = draw(keys("layer", "tag"))
    processed, dropped, rerouted = draw(small), draw(small), draw(small)
    layer = where["layer"]
    return {
        **where,
        "expert": draw(st.integers(0, EXPERTS[layer] + ZERO[layer] - 1)),
        "routed": processed + dropped + rerouted,
        "processed": processed,
        "overflowed": dropped + rerouted,
        "dropped": dropped,
        "rerouted_in": draw(small),
        "padding": draw(small),
        "prob_sum": draw(st.sampled_from([None, 0.25, 1.5])),
        "weight_sum": draw(st.sampled_from([None, 0.5])),
    }


@st.composite
def confidences(draw: st.DrawFn) -> dict[str, Any]:
    """A row of `routers`: some sums unknown, some tokens without a finite logit."""
    tokens = draw(small)
    sums = st.sampled_from([None, 0.0, 0.5, 3.25])
    return {
        **draw(keys("layer", "tag")),
        "tokens": tokens,
        "unserved_tokens": draw(st.integers(0, tokens)),
        "nonfinite_tokens": draw(st.integers(0, tokens)),
        **{f"{name}_sum": draw(sums) for name in ("entropy", "margin", "top1_prob", "zloss")},
    }


@st.composite
def routed_tokens(draw: st.DrawFn) -> dict[str, Any]:
    """Tokens of a tag in a layer: a row of `routers`, and without its tag one of `layers`."""
    return {**draw(keys("layer", "tag")), "tokens": draw(st.integers(0, 40))}


def infos() -> list[LayerInfo]:
    """The layers that generated rows belong to."""
    return [layer_info(i, EXPERTS[i], zero_experts=ZERO[i]) for i in range(LAYERS)]


def trace_of(folder: Path, config: Sequence[LayerInfo] = (), **tables: Rows) -> Trace:
    """Half of each rank's rows sealed, half in an open stream; rank 0 where a row names none."""
    for rank in range(RANKS):
        write_meta(folder, meta(rank, world=RANKS, layers=list(config or infos())))
        for table, rows in tables.items():
            mine = [r for r in rows if r.get("rank", 0) == rank]
            half = len(mine) // 2
            segment(folder, table, mine[:half], rank=rank)
            if mine[half:]:
                stream(folder, table, mine[half:], rank=rank, seq=1, batches=2)
    return open_trace(folder)


def fitting(name: str, narrow: dict[str, Any]) -> dict[str, Any]:
    """The filters that the question has."""
    return {p.name: narrow[p.name] for p in question(name).parameters if p.name in narrow}


def kept(rows: Rows, narrow: dict[str, Any]) -> Rows:
    """The rows that the filters leave; a row that lacks a column is not narrowed by it."""
    left = rows
    for name, value in narrow.items():
        if name.startswith("first_"):
            column = name.removeprefix("first_")
            left = [r for r in left if column not in r or r[column] >= value]
        elif name.startswith("last_"):
            column = name.removeprefix("last_")
            left = [r for r in left if column not in r or r[column] <= value]
        elif name in ("phase", "tag", "rank"):
            left = [r for r in left if name not in r or r[name] == value]
    return left


def layers_of(narrow: dict[str, Any]) -> list[int]:
    """The layers that the filters leave, whether they ran or not."""
    first, last = narrow.get("first_layer", 0), narrow.get("last_layer", LAYERS - 1)
    return [i for i in range(LAYERS) if first <= i <= last]


def ask(trace: Trace, name: str, narrow: dict[str, Any], *keys: str) -> dict[Any, dict[str, Any]]:
    """The answer by its keys, which must be unique, and in order."""
    rows = trace.query(name, **narrow).rows()
    found = {tuple(row[k] for k in keys): row for row in rows}
    assert len(found) == len(rows), "a key came twice"
    assert list(found) == sorted(found), "not sorted by its keys"
    assert {type(v) for row in rows for v in row.values()} <= {int, float, str, bool, type(None)}
    return found


def ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def same(got: float | None, expected: float | None) -> bool:
    if got is None or expected is None:
        return got is expected
    return got == pytest.approx(expected, rel=1e-9, abs=1e-12)
