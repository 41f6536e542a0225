"""Counts of windows as tables of the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moe_lens.trace.events import LayerCounts
from moe_lens.trace.rounding import SUM_BITS, keep_mantissa
from moe_lens.trace.schema import TABLES
from moe_lens.trace.windows import NULL_WHEN_UNSEEN, Window

_LOAD_COUNTS = (
    *("routed", "processed", "overflowed", "dropped", "rerouted_in", "padding"),
    *("prob_sum", "weight_sum", "received"),
)
_ROUTER_COUNTS = ("tokens", "unserved", "nonfinite")
_ROUTER_SUMS = ("entropy_sum", "margin_sum", "top1_prob_sum", "zloss_sum", "group_entropy_sum")
_RENAMED = {"unserved": "unserved_tokens", "nonfinite": "nonfinite_tokens"}

_SCHEMAS = {n: (t.schema, [(f.name, f.type) for f in t.schema]) for n, t in TABLES.items()}
"""Taken apart once: pyarrow makes a new object of every field that is looked at."""


def window_tables(windows: Sequence[Window]) -> dict[str, pa.Table]:
    """Windows as rows, by table name, window by window, each in the tables' sort order.

    Many at once: laying out one costs almost as much as laying out ten.

    Args:
        windows: Of one attempt, one after the other.
    """
    laid = _Laid(windows)
    out = {"slices": laid.slices()}
    if laid.counts:
        out |= {"load": laid.load(), "layers": laid.layers(), "routers": laid.routers()}
    return out


class _Laid:
    """Windows side by side; arrays have an entry for each layer of each window."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows
        self.tags = list(dict.fromkeys(tag for w in windows for tag in w.tags))
        at = {tag: i for i, tag in enumerate(self.tags)}
        self.tag_of = [np.array([at[tag] for tag in w.tags], np.int64) for w in windows]
        """By window: the place of each of its tags."""
        sums = [w.sums() for w in windows]
        self.counts = [counts for each in sums for counts in each]
        self.noted = [noted for w in windows for noted in w.notes()]
        self.window = np.repeat(np.arange(len(windows)), [len(each) for each in sums])

    def load(self) -> pa.Table:
        shape = [x.routed_GE.shape for x in self.counts]
        size = [g * e for g, e in shape]
        flat = {n: _flat(self.counts, f"{n}_GE", size) for n in _LOAD_COUNTS}
        signs = [flat[n] for n in _LOAD_COUNTS if n != "weight_sum"]
        at = np.flatnonzero(np.any([(x != 0) & (x == x) for x in signs if x is not None], axis=0))
        layer = np.repeat([x.layer for x in self.counts], size)[at]
        tags = [self.tag_of[w] for w in self.window]
        tag = np.concatenate([np.repeat(t, e) for t, (_, e) in zip(tags, shape, strict=True)])[at]
        expert = np.concatenate([np.tile(np.arange(e), g) for g, e in shape])[at]
        columns: dict[str, Any] = {n: _at(x, at) for n, x in flat.items()}
        for name in ("prob_sum", "weight_sum"):
            if columns[name] is not None:
                columns[name] = _nullable(keep_mantissa(columns[name], SUM_BITS))
        if columns["received"] is not None:
            columns["received"] = _nullable(columns["received"]).cast(pa.int64())
        window = np.repeat(self.window, size)[at]
        return self._rows("load", window, layer=layer, tag=self._tag(tag), expert=expert, **columns)

    def layers(self) -> pa.Table:
        return self._rows(
            "layers",
            self.window,
            layer=[x.layer for x in self.counts],
            forwards=[s.forwards for s in self.noted],
            tokens=[x.tokens for x in self.counts],
            padding_tokens=[x.padding_tokens for x in self.counts],
            capacity=[x.capacity for x in self.counts],
            capacity_groups=[
                None if x.capacity is None else x.capacity_groups for x in self.counts
            ],
            max_load=[s.max_load for s in self.noted],
            max_load_expert=[s.max_load_expert for s in self.noted],
            touched=[s.touched for s in self.noted],
            dispatch_ns=[x.dispatch_ns for x in self.counts],
            combine_ns=[x.combine_ns for x in self.counts],
        )

    def routers(self) -> pa.Table:
        size = [len(x.tokens_G) for x in self.counts]
        names = (*_ROUTER_COUNTS, *_ROUTER_SUMS)
        flat = {n: _flat(self.counts, f"{n}_G", size) for n in names}
        tokens = flat["tokens"]
        assert tokens is not None
        at = np.flatnonzero(tokens)
        layer = np.repeat([x.layer for x in self.counts], size)[at]
        tag = np.concatenate([self.tag_of[w] for w in self.window])[at]
        columns: dict[str, Any] = {n: _at(flat[n], at) for n in _ROUTER_COUNTS}
        columns |= {n: None if (x := flat[n]) is None else _nullable(x[at]) for n in _ROUTER_SUMS}
        window = np.repeat(self.window, size)[at]
        return self._rows("routers", window, layer=layer, tag=self._tag(tag), **columns)

    def slices(self) -> pa.Table:
        joined = {
            n: np.concatenate([getattr(w, n) for w in self.windows])
            for n in ("tokens_G", "sequences_G", "loss_sum_G", "loss_tokens_G")
        }
        at = np.flatnonzero(joined["tokens_G"] + joined["loss_tokens_G"])
        given = joined["loss_tokens_G"][at]
        window = np.repeat(np.arange(len(self.windows)), [len(w.tags) for w in self.windows])[at]
        return self._rows(
            "slices",
            window,
            tag=self._tag(np.concatenate(self.tag_of)[at]),
            tokens=joined["tokens_G"][at],
            sequences=joined["sequences_G"][at],
            loss_sum=_nullable(np.where(given > 0, joined["loss_sum_G"][at], np.nan)),
            loss_tokens=given,
        )

    def _tag(self, at: NDArray[np.int64]) -> pa.Array:
        return _texts(self.tags, at)

    def _rows(self, table: str, window: NDArray[np.int64], **columns: Any) -> pa.Table:
        """`window` says which window each row is of."""
        phases = list(dict.fromkeys(w.phase for w in self.windows))
        phase = np.array([phases.index(w.phase) for w in self.windows])
        keys = {
            "attempt": np.full(len(window), self.windows[0].attempt, np.int32),
            "window": np.array([w.number for w in self.windows], np.int64)[window],
            "step": np.array([w.step for w in self.windows], np.int64)[window],
            "phase": _texts(phases, phase[window]),
        }
        return as_table(table, keys | columns)


def _texts(texts: list[str], at: NDArray[np.int64]) -> pa.Array:
    if len(texts) == 1:
        return pa.repeat(pa.scalar(texts[0], pa.string()), len(at))
    return pa.array(texts, pa.string()).take(pa.array(at))


def as_table(name: str, columns: dict[str, Any]) -> pa.Table:
    """Columns by the schema's names as a table of the format, cast to its types; None: all null."""
    schema, fields = _SCHEMAS[name]
    columns = {_RENAMED.get(k, k): v for k, v in columns.items()}
    n = max(len(v) for v in columns.values() if v is not None)
    arrays = [_array(columns[field], kind, n) for field, kind in fields]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(x: Any, kind: pa.DataType, n: int) -> pa.Array:
    if x is None:
        return pa.nulls(n, kind)
    if isinstance(x, pa.Array):
        return x if x.type == kind else x.cast(kind)
    return pa.array(x, kind)


def _flat(counts: list[LayerCounts], name: str, size: list[int]) -> NDArray[Any] | None:
    """One array of all layers; where one has none: NaN if null means unseen, else 0.

    None where no layer has any and null means unseen.
    """
    bare = name.rpartition("_")[0]
    given = [getattr(c, name) for c in counts]
    if bare in NULL_WHEN_UNSEEN:
        if all(x is None for x in given):
            return None
        blank: float = np.nan
    else:
        blank = 0.0 if bare.endswith("_sum") else 0
    pairs = zip(given, size, strict=True)
    return np.concatenate([np.full(n, blank) if x is None else x.ravel() for x, n in pairs])


def _at(x: NDArray[Any] | None, at: NDArray[np.int64]) -> NDArray[Any] | None:
    return None if x is None else x[at]


def _nullable(x: NDArray[Any]) -> pa.Array:
    """NaN becomes null: the sum is not known for every token."""
    return pa.array(x, from_pandas=True)
