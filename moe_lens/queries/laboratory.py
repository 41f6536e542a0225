"""Folders of `moe-lens lab granularity`: which there are, and their tables.

DIR/results.parquet          a row for each student, written as it finishes
DIR/regions.parquet          regions of the plane, counted
DIR/pictures.parquet         the plane, point by point
DIR/configurations.parquet   sets of experts that random routers reach
DIR/routing/                 a trace of the trained routers
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import TraceError
from moe_lens.queries.places import folders_below

_KEY = b"moe_lens.lab"
_RESULTS = "results"
_ROUTERS = ("gate", "gate_bias_values")
"""Columns of weights, which nobody looks at as numbers."""
_NEEDED = {
    "teacher", "teacher_experts", "teacher_top_k", "student", "experts", "top_k", "width",
    "gate_bias", "width_factor", "experts_factor", "learning_rate", "name", "nmse", "nmse_min",
    "fvu", "affine_nmse", "affine_fvu", "zero_fvu", "sets_used", "sets_tokens", "sets_bits",
    "seconds",
}  # fmt: skip

_SAID = {"preset", "kind", "hidden", "seed", "steps", "batch", "students"}


@dataclass(frozen=True)
class Laboratory:
    """What one folder holds.

    Attributes:
        path: The folder.
        about: preset, kind (of experts), hidden, seed, steps, batch; students: names of all runs.
        students: A row a finished run: its setting, errors, sets in use.
    """

    path: Path
    about: dict[str, Any]
    students: pd.DataFrame

    @property
    def preset(self) -> str:
        """The preset's name."""
        return str(self.about["preset"])

    def rows(self) -> list[Any]:
        """The finished students in the order of the plan; `moe_lens.granularity.gap` takes them."""
        order = {name: place for place, name in enumerate(self.about["students"])}
        known = self.students[self.students["name"].isin(order)]
        ordered = known.sort_values("name", key=lambda names: names.map(order))
        return list(ordered.itertuples(index=False))

    @property
    def missing(self) -> int:
        """Students that were not trained yet."""
        return len(set(self.about["students"]) - set(self.students["name"]))

    def table(self, name: str) -> pd.DataFrame:
        """regions, pictures or configurations; empty where it was not made yet.

        Raises:
            TraceError: Its file cannot be read.
        """
        path = self.path / f"{name}.parquet"
        return _read(path)[0].to_pandas() if path.exists() else pd.DataFrame()


def laboratories(place: str | Path) -> list[Path]:
    """The laboratories at or below a folder, or above it if it is the routing of one."""
    root = Path(place).resolve()
    at = [each for each in (root, root.parent) if _is_one(each)]
    return at or [each for each in folders_below(root) if _is_one(each)]


def laboratory(folder: str | Path) -> Laboratory:
    """Read a folder.

    Raises:
        TraceError: It holds no results, or damaged ones.
    """
    path = Path(folder) / f"{_RESULTS}.parquet"
    table, about = _read(path)
    if lacking := sorted(_NEEDED - set(table.column_names) | _SAID - set(about)):
        raise TraceError(
            f"{path} is of another version of the laboratory (it has no {', '.join(lacking)}): "
            "run moe-lens lab granularity again, with --force."
        )
    kept = [name for name in table.column_names if name not in _ROUTERS]
    return Laboratory(Path(folder), about, table.select(kept).to_pandas())


def _is_one(folder: Path) -> bool:
    path = folder / f"{_RESULTS}.parquet"
    try:
        return path.is_file() and _KEY in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        # Somebody else's, or damaged: what is ours says so by what else lies there.
        return (folder / "routing" / "meta").is_dir()


def _read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(path, partitioning=None)
        about = json.loads((table.schema.metadata or {})[_KEY])
    except (OSError, KeyError, ValueError, pa.ArrowException) as e:
        raise TraceError(
            f"{path} is not a result of moe-lens lab granularity ({type(e).__name__}: {e})."
        ) from e
    return table, about
