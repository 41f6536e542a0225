"""Windows of counts: what one or many forwards saw, summed, and then laid into table rows.

A forward stands alone wherever a capacity applies or it makes at least as many choices as there
are experts; small ones of one phase (decoding) share a window for about a second.
"""

from __future__ import annotations

import copy
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moe_lens.trace.events import Doubles, Forward, Ints, LayerCounts, Losses
from moe_lens.trace.rounding import SUM_BITS, keep_mantissa
from moe_lens.trace.schema import TABLES

SHARED_SECONDS = 1.0

_SUMMED = [f.name for f in fields(LayerCounts) if f.name.endswith(("_G", "_GE"))]


def stands_alone(forward: Forward) -> bool:
    """The counts of this forward must not be summed with those of another."""
    return forward.phase == "train" or any(
        x.capacity is not None or x.tokens * (x.top_k or 1) >= x.routed_GE.shape[1]
        for x in forward.layers
    )


class _LayerSum:
    """One layer of a window: the counts, and what can only be known forward by forward."""

    def __init__(self, counts: LayerCounts) -> None:
        self.counts = counts
        self.forwards = 0
        self.max_load = self.max_load_expert = self.touched = 0

    def note(self, counts: LayerCounts) -> None:
        load_E = counts.processed_GE.sum(0)
        if counts.rerouted_in_GE is not None:
            load_E = load_E + counts.rerouted_in_GE.sum(0)
        top = int(load_E.argmax()) if len(load_E) else 0
        if self.forwards == 0 or load_E[top] > self.max_load:
            self.max_load, self.max_load_expert = int(load_E[top]), top
        self.touched += int(np.count_nonzero(load_E))
        self.forwards += 1


class Window:
    """Sums forwards; `tables` lays the sums into rows of load, layers, routers and slices."""

    def __init__(self, number: int, attempt: int, forward: Forward) -> None:
        self.number = number
        self.attempt = attempt
        self.step = forward.step
        self.phase = forward.phase
        self.alone = stands_alone(forward)
        self._t_start_ns = forward.t_start_ns
        self._clear()

    def _clear(self) -> None:
        self.tags: list[str] = []
        self._since = time.monotonic()
        self._layers: dict[int, _LayerSum] = {}
        self._tokens_G = np.zeros(0, np.int64)
        self._sequences_G = np.zeros(0, np.int64)
        self._loss_sum_G = np.zeros(0)
        self._loss_tokens_G = np.zeros(0, np.int64)

    def emptied(self) -> Window:
        """This window once more, for what belongs to it and came after its rows were written."""
        again = copy.copy(self)
        again._clear()
        return again

    def takes(self, forward: Forward) -> bool:
        """Whether this forward may still be summed into this window.

        By when it began: the writer takes forwards some time after they ran, many at once.
        """
        return (
            not self.alone
            and abs(forward.t_start_ns - self._t_start_ns) <= SHARED_SECONDS * 1e9
            and forward.phase == self.phase
            and not stands_alone(forward)
        )

    def expired(self) -> bool:
        """It has waited long enough for another forward."""
        return time.monotonic() - self._since > SHARED_SECONDS

    def add(self, forward: Forward) -> None:
        at_G = self._index(forward.tags)
        self._tokens_G[at_G] += forward.tokens_G
        self._sequences_G[at_G] += forward.sequences_G
        for x in forward.layers:
            if x.layer in self._layers:
                _merge(self._layers[x.layer].counts, x, at_G, len(self.tags))
            else:
                # A shared window sums in place; the forward's own counts are not ours to change.
                own = x if self.alone else _copy(x)
                spread(own, at_G, len(self.tags))
                self._layers[x.layer] = _LayerSum(own)
            self._layers[x.layer].note(x)

    def add_losses(self, losses: Losses) -> None:
        at_G = self._index(losses.tags)
        self._loss_sum_G[at_G] += losses.loss_sum_G
        self._loss_tokens_G[at_G] += losses.loss_tokens_G

    def _index(self, tags: list[str]) -> NDArray[np.int64]:
        """Where a forward's tags stand among the window's, which grow by the new ones."""
        new = [t for t in tags if t not in self.tags]
        if new:
            self.tags += new
            for name in ("_tokens_G", "_sequences_G", "_loss_sum_G", "_loss_tokens_G"):
                setattr(self, name, _grown(getattr(self, name), len(self.tags)))
        return np.array([self.tags.index(t) for t in tags], np.int64)

    def tables(self) -> dict[str, pa.Table]:
        """The window as rows, by table name. Rows of layers are in the tables' sort order."""
        sums = [self._layers[i] for i in sorted(self._layers)]
        for s in sums:  # tags that came after a layer's last forward
            spread(s.counts, np.arange(len(s.counts.tokens_G)), len(self.tags))
        out = {"slices": self._slices()}
        if sums:
            out |= {"load": self._load(sums), "layers": self._layer_rows(sums)}
            out["routers"] = self._routers(sums)
        return out

    def _load(self, sums: list[_LayerSum]) -> pa.Table:
        counts = [s.counts for s in sums]
        shape = [x.routed_GE.shape for x in counts]
        size = [g * e for g, e in shape]
        flat = {n: _flat(counts, f"{n}_GE", size) for n in _LOAD_COUNTS}
        signs = [flat[n] for n in _LOAD_COUNTS if n != "weight_sum"]
        at = np.flatnonzero(np.any([(x != 0) & (x == x) for x in signs if x is not None], axis=0))
        layer = np.repeat([x.layer for x in counts], size)[at]
        tag = np.concatenate([np.repeat(np.arange(g), e) for g, e in shape])[at]
        expert = np.concatenate([np.tile(np.arange(e), g) for g, e in shape])[at]
        columns: dict[str, Any] = {n: _at(x, at) for n, x in flat.items()}
        for name in ("prob_sum", "weight_sum"):
            if columns[name] is not None:
                columns[name] = _nullable(keep_mantissa(columns[name], SUM_BITS))
        if columns["received"] is not None:
            columns["received"] = _nullable(columns["received"]).cast(pa.int64())
        return self._rows("load", layer=layer, tag=self._tag(tag), expert=expert, **columns)

    def _layer_rows(self, sums: list[_LayerSum]) -> pa.Table:
        return self._rows(
            "layers",
            layer=[s.counts.layer for s in sums],
            forwards=[s.forwards for s in sums],
            tokens=[s.counts.tokens for s in sums],
            padding_tokens=[s.counts.padding_tokens for s in sums],
            capacity=[s.counts.capacity for s in sums],
            max_load=[s.max_load for s in sums],
            max_load_expert=[s.max_load_expert for s in sums],
            touched=[s.touched for s in sums],
            dispatch_ns=None,
            combine_ns=None,
        )

    def _routers(self, sums: list[_LayerSum]) -> pa.Table:
        counts = [s.counts for s in sums]
        size = [len(self.tags)] * len(sums)
        flat = {n: _flat(counts, f"{n}_G", size) for n in (*_ROUTER_COUNTS, *_ROUTER_SUMS)}
        tokens = flat["tokens"]
        assert tokens is not None
        at = np.flatnonzero(tokens)
        layer = np.repeat([x.layer for x in counts], size)[at]
        tag = np.tile(np.arange(len(self.tags)), len(sums))[at]
        columns: dict[str, Any] = {n: _at(flat[n], at) for n in _ROUTER_COUNTS}
        columns |= {n: None if (x := flat[n]) is None else _nullable(x[at]) for n in _ROUTER_SUMS}
        return self._rows("routers", layer=layer, tag=self._tag(tag), **columns)

    def _slices(self) -> pa.Table:
        at = np.flatnonzero(self._tokens_G + self._loss_tokens_G)
        given = self._loss_tokens_G[at]
        return self._rows(
            "slices",
            tag=self._tag(at),
            tokens=self._tokens_G[at],
            sequences=self._sequences_G[at],
            loss_sum=_nullable(np.where(given > 0, self._loss_sum_G[at], np.nan)),
            loss_tokens=given,
        )

    def _tag(self, at: NDArray[np.int64]) -> pa.Array:
        if len(self.tags) == 1:
            return pa.repeat(pa.scalar(self.tags[0], pa.string()), len(at))
        return pa.array(self.tags, pa.string()).take(pa.array(at))

    def _rows(self, table: str, **columns: Any) -> pa.Table:
        n = len(next(iter(columns.values())))
        keys = {
            "attempt": np.full(n, self.attempt, np.int32),
            "window": np.full(n, self.number, np.int64),
            "step": np.full(n, self.step, np.int64),
            "phase": pa.repeat(pa.scalar(self.phase, pa.string()), n),
        }
        return as_table(table, keys | columns)


_LOAD_COUNTS = (
    *("routed", "processed", "overflowed", "dropped", "rerouted_in", "padding"),
    *("prob_sum", "weight_sum", "received"),
)
_ROUTER_COUNTS = ("tokens", "unserved", "nonfinite")
_ROUTER_SUMS = ("entropy_sum", "margin_sum", "top1_prob_sum", "zloss_sum")
_RENAMED = {"unserved": "unserved_tokens", "nonfinite": "nonfinite_tokens"}
_NULL_WHEN_UNSEEN = {"prob_sum", "received", *_ROUTER_SUMS}


_SCHEMAS = {n: (t.schema, [(f.name, f.type) for f in t.schema]) for n, t in TABLES.items()}
"""Taken apart once: pyarrow makes a new object of every field that is looked at."""


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
    if bare in _NULL_WHEN_UNSEEN:
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


def _grown(x: NDArray[Any], n: int) -> NDArray[Any]:
    if len(x) == n:
        return x
    return np.concatenate([x, np.zeros((n - len(x), *x.shape[1:]), x.dtype)])


def spread(x: LayerCounts, at_G: NDArray[np.int64], n: int) -> None:
    """Lay the counts of a forward's tags out over the window's `n` tags, in place."""
    if len(at_G) == n and (at_G == np.arange(n)).all():
        return
    for name in _SUMMED:
        old: Ints | Doubles | None = getattr(x, name)
        if old is not None:
            new = np.zeros((n, *old.shape[1:]), old.dtype)
            new[at_G] = old
            setattr(x, name, new)


def _copy(x: LayerCounts) -> LayerCounts:
    arrays = {n: a.copy() for n in _SUMMED if (a := getattr(x, n)) is not None}
    return replace(x, rows=None, **arrays)


def _merge(into: LayerCounts, x: LayerCounts, at_G: NDArray[np.int64], n: int) -> None:
    spread(into, np.arange(len(into.tokens_G)), n)
    into.tokens += x.tokens
    into.padding_tokens += x.padding_tokens
    for name in _SUMMED:
        old, new = getattr(into, name), getattr(x, name)
        if (old is None or new is None) and name.rpartition("_")[0] in _NULL_WHEN_UNSEEN:
            setattr(into, name, None)  # unknown for some of the forwards: unknown
            continue
        if new is None:
            continue
        if old is None:
            old = np.zeros((n, *new.shape[1:]), new.dtype)
            setattr(into, name, old)
        old[at_G] += new
