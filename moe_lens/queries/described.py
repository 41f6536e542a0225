"""What the views of a session hold: columns, types and meaning, for people who write SQL."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lens.trace.schema import COUNTERFACTUAL, LOAD_COARSE, REPLAY, REPLAY_EP, TABLES

_BESIDE = (LOAD_COARSE, REPLAY, REPLAY_EP, COUNTERFACTUAL)

_MORE = {
    "run": "name of the run",
    "rank": "rank that recorded the row",
    "result": "name of the result: the file `<result>.parquet` in the run's folder of this table",
}

_META = {
    "moe_layers": "an MoE layer: how its router is configured (from the meta files)",
    "moe_experts": "an expert of a layer, and whose weights it runs: the same `identity` in two "
    "layers is the same weights (from the meta files)",
    "runs": "a rank of a run: what was recorded, when, and how it ended (from the meta files)",
}


@dataclass(frozen=True)
class ViewColumn:
    """One column of a view."""

    name: str
    type: str
    """DuckDB's name of it."""
    meaning: str


@dataclass(frozen=True)
class View:
    """One view, and what a row of it is."""

    name: str
    row: str
    columns: tuple[ViewColumn, ...]


def describe(name: str, columns: dict[str, str]) -> View:
    """A view in words.

    Args:
        name: Of the view.
        columns: Name of each column to its type.
    """
    table = (TABLES | {t.name: t for t in _BESIDE}).get(name)
    known = {} if table is None else {c.name: c.doc for c in table.columns}
    row = _META.get(name, "") if table is None else table.row
    declared = "declared by the user" if name == "sequences" else ""
    return View(
        name,
        row,
        tuple(
            ViewColumn(column, type_, known.get(column, _MORE.get(column, declared)))
            for column, type_ in columns.items()
        ),
    )
