"""The file that a measurement on a model leaves in a run: `RUN/<table>/<name>.parquet`.

Rows go into `<name>-interrupted.parquet` as they are measured; complete, it takes its name, and
the place of an earlier result. If Ctrl-C comes first, it stays, and holds what was measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moe_lens.errors import TraceError
from moe_lens.trace.schema import Table
from moe_lens.trace.segment import open_parquet


@dataclass(frozen=True, repr=False)
class Measured:
    """What was measured.

    Attributes:
        path: The file.
        about: What was measured, and on what; also in the file's metadata.
        interrupted: Ctrl-C ended it: the file holds what was measured until then.
    """

    path: Path
    about: dict[str, Any]
    interrupted: bool

    def __repr__(self) -> str:
        tokens = self.about.get("measured_tokens")
        of = "" if tokens is None else f", {tokens} tokens"
        return (
            f"{type(self).__name__}({self.path}{of}{', interrupted' if self.interrupted else ''})"
        )

    def columns(self) -> dict[str, NDArray[Any]]:
        """The file by columns, but those of lists."""
        table = pq.read_table(self.path, partitioning=None)
        plain = (f.name for f in table.schema if not pa.types.is_list(f.type))
        return {name: table.column(name).to_numpy() for name in plain}


class Result:
    """A result that is being written; use it in a `with`.

    Args:
        path: Of the complete result.
        about: Kept in its metadata, as it is at the end.
        table: Its columns.

    Raises:
        TraceError: Nothing can be written there.
    """

    def __init__(self, path: Path, about: dict[str, Any], table: Table) -> None:
        self.path, self.interrupted = path, False
        self._about, self._schema, self._rows = about, table.schema, 0
        self._unfinished = path.with_name(f"{path.stem}-interrupted.parquet")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = open_parquet(self._unfinished, table)
        except OSError as e:
            raise TraceError(f"{path.parent} cannot be written ({e.strerror or e}).") from e

    def add(self, columns: dict[str, Any]) -> None:
        """Write rows: arrays or lists, by the table's columns."""
        arrays = []
        for field in self._schema:
            array = pa.array(columns[field.name], field.type)
            if field.nullable and pa.types.is_floating(field.type):
                array = pc.if_else(pc.is_nan(array), pa.scalar(None, field.type), array)
            arrays.append(array)
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table)
        self._rows += table.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Close the file; only Ctrl-C is not passed on, if there is anything to keep."""
        self.interrupted = isinstance(error, KeyboardInterrupt) and self._rows > 0
        self._about["interrupted"] = self.interrupted
        self._writer.add_key_value_metadata({"moe_lens": json.dumps(self._about)})
        self._writer.close()
        if error is None:
            self._unfinished.replace(self.path)
        elif self.interrupted:
            self.path = self._unfinished
        else:
            self._unfinished.unlink()
        return self.interrupted


def result_path(run: Path, table: Table, name: str) -> Path:
    """Where a result of this name lies.

    Raises:
        TraceError: It is no name of a file.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise TraceError(f"--name is the name of a file without its folder, got {name!r}.")
    return run / table.name / f"{name.removesuffix('.parquet')}.parquet"


def read_measured(run: Path, table: Table, name: str) -> tuple[Path, dict[str, Any], bool]:
    """Path, about and interrupted of a result that lies in a run.

    What an interrupted measurement left, if there is no other.

    Raises:
        TraceError: There is none.
    """
    path = result_path(run, table, name)
    if not path.exists():
        partial = path.with_name(f"{path.stem}-interrupted.parquet")
        if not partial.exists():
            raise TraceError(
                f"{run} has no result {path.stem!r}: measure one with --model and --data."
            )
        path = partial
    try:
        about = json.loads(pq.read_metadata(path).metadata[b"moe_lens"])
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowInvalid) as e:
        raise TraceError(f"{path} is not a result of moe-lens {table.name}: {e}") from e
    return path, about, bool(about["interrupted"])
