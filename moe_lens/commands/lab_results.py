"""The results of the laboratory on disk: whole files, and a row for each student as it finishes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.commands.demo import make_way
from moe_lens.errors import CommandError
from moe_lens.granularity.presets import Plan
from moe_lens.granularity.runs import Row
from moe_lens.trace.whole import written_whole

COUNTED = ("regions", "pictures", "configurations")
"""Tables that need no training."""
TABLES = ("results", *COUNTED)
_KEY = b"moe_lens.lab"
_TYPES = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "list[float]": pa.list_(pa.float32()),
}
SCHEMA = pa.schema([(f.name, _TYPES[str(f.type)]) for f in fields(Row)])


class Results:
    """The folder of one plan's results.

    Attributes:
        folder: The folder.
        path: The file of the students.
        page: The figures, written last: while they are there, nothing is missing.
        rows: Of students that have finished, here or before.

    Args:
        folder: Where they lie, or will.
        plan: Whose they are.
        force: Remove what a laboratory left there, and nothing else.

    Raises:
        CommandError: Something else lies there, or results of other settings, or damaged ones.
    """

    def __init__(self, folder: Path, plan: Plan, *, force: bool) -> None:
        self.folder, self.path = folder, folder / "results.parquet"
        self.page = folder / "figures.html"
        self.settings = _settings(plan)
        self.rows: list[Row] = []
        if self.path.exists():
            if force:
                self._clear()
            else:
                self._read()
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CommandError(
                f"{folder} exists and holds no results of the laboratory: name another folder with "
                "--out."
            )
        self._write()  # before hours of training: a disk that refuses does so now

    @property
    def names(self) -> set[str]:
        """Of the runs that have finished."""
        return {row.name for row in self.rows}

    def add(self, row: Row) -> None:
        """Keep a row; it stays if the process is killed right after."""
        self.page.unlink(missing_ok=True)
        self.rows.append(row)
        self._write()

    def save(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Write another table of this folder, with the same settings in its head."""
        self._save(name, pa.Table.from_pylist(list(records)))

    def counted(self) -> dict[str, list[dict[str, Any]]] | None:
        """The tables that were saved; None: all there is was not made, or not of these students."""
        try:
            tables = [pq.read_table(self.folder / f"{name}.parquet") for name in COUNTED]
            heads = [json.loads((table.schema.metadata or {})[_KEY]) for table in tables]
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return None
        whole = self.page.exists() and (self.folder / "routing").is_dir()
        if not whole or any(head != self.settings for head in heads):
            return None
        return {n: table.to_pylist() for n, table in zip(COUNTED, tables, strict=True)}

    def _write(self) -> None:
        self._save("results", pa.Table.from_pylist([asdict(row) for row in self.rows], SCHEMA))

    def _save(self, name: str, table: pa.Table) -> None:
        head = {_KEY: json.dumps(self.settings).encode()}
        with written_whole(self.folder / f"{name}.parquet") as part:
            pq.write_table(table.replace_schema_metadata(head), part, compression="zstd")

    def _clear(self) -> None:
        """Remove what the laboratory writes; a damaged result may be one of its own, too."""
        try:
            ours = _KEY in (pq.read_schema(self.path).metadata or {})
        except (OSError, pa.ArrowException):
            ours = True
        if not ours:
            raise CommandError(
                f"{self.path} is not a result of moe-lens lab granularity, and is not replaced: "
                "name another folder with --out."
            )
        if (self.folder / "routing").exists():
            make_way(self.folder / "routing", force=True)
        for path in (*(self.folder / f"{table}.parquet" for table in TABLES), self.page):
            path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            table = pq.read_table(self.path)
            there = json.loads((table.schema.metadata or {})[_KEY])
            rows = [Row(**record) for record in table.to_pylist()]
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as e:
            raise CommandError(
                f"{self.path} is not a result of moe-lens lab granularity ({type(e).__name__}: "
                f"{e}): name another folder with --out."
            ) from e
        for name, asked in self.settings.items():
            if there.get(name) != asked:
                raise CommandError(
                    f"{self.folder} holds results of other settings ({_differ(name, there, asked)})"
                    ": name another folder with --out, or begin anew with --force."
                )
        self.rows = rows


def _settings(plan: Plan) -> dict[str, Any]:
    """What must be the same for results to belong together."""
    return {
        "preset": plan.preset,
        "hidden": plan.hidden,
        "kind": plan.kind,
        "seed": plan.seed,
        **asdict(plan.recipe),
        "students": [run.name for run in plan.runs],
    }


def _differ(name: str, there: dict[str, Any], asked: object) -> str:
    if name == "students":
        return "its teacher or its students are others"
    return f"{name}: {there.get(name)} there, {asked} asked for"
