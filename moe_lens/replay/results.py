"""The file that a replay leaves: `RUN/replay/<name>.parquet`, or `RUN/replay_ep/<name>.parquet`.

A complete result replaces an earlier one of its name in one step. Until it is complete, what was
measured so far lies beside it, in `<name>-interrupted.parquet`, and stays there if the replay ends
early.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import ReplayError
from moe_lens.replay.floors import Shape
from moe_lens.replay.machine import slug
from moe_lens.replay.measure import Row
from moe_lens.replay.settings import Settings
from moe_lens.trace.schema import REPLAY, Table
from moe_lens.trace.segment import open_parquet

KEY = b"moe_lens"
INTERRUPTED = "-interrupted"


class Output:
    """The place of one replay's result.

    Args:
        path: Of the complete result.
        table: What its rows are.

    Raises:
        ReplayError: Nothing can be written there.
    """

    def __init__(self, path: Path, table: Table = REPLAY) -> None:
        self.path, self.table = path, table
        self.unfinished = path.with_name(f"{path.stem}{INTERRUPTED}{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as e:
            raise ReplayError(
                f"{path.parent} cannot be written ({e.strerror or e}), and the result is to lie "
                "there. Name a file elsewhere with --out."
            ) from e
        if path.is_dir():
            raise ReplayError(f"{path} is a folder: the result is a file, name another with --out.")
        if path.suffix != ".parquet":
            raise ReplayError(
                f"{path}: the result is a Parquet file, and its name ends in .parquet."
            )
        if path.exists():
            _check_ours(path)

    def so_far(self, rows: list[Row], about: dict[str, Any]) -> None:
        """Keep what was measured so far."""
        _write(self.unfinished, self.table, rows, about)

    def complete(self, rows: list[Row], about: dict[str, Any]) -> None:
        """Write the result, and remove what was kept of it before."""
        _write(self.path, self.table, rows, about)
        self.unfinished.unlink(missing_ok=True)


def _check_ours(path: Path) -> None:
    """Refuse to write over what no replay wrote."""
    try:
        about(path)
    except ReplayError as e:
        raise ReplayError(f"{e}. It is not written over: remove it, or name another file.") from e


def result_path(run: Path, name: str, table: Table = REPLAY) -> Path:
    """Where a result of this name lies.

    Raises:
        ReplayError: It is no name of a file.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise ReplayError(f"--name is the name of a file without its folder, got {name!r}.")
    return run / table.name / f"{name.removesuffix('.parquet')}.parquet"


def name_of(settings: Settings, shapes: list[Shape], device: str) -> str:
    """What a result is called if nobody says: what is replayed, policy, sizes, dtype, device.

    A replay of a part of the run, or by another backend, does not replace that of the whole.
    """
    policy = settings.policy
    words = [policy.name]
    if policy.capped:
        words += [f"{policy.capacity_factor:g}", policy.by]
    if policy.top_k is not None:
        words.append(f"top{policy.top_k}")
    sizes = sorted({f"{s.hidden}x{s.intermediate}" for s in shapes})
    words += [sizes[0] if len(sizes) == 1 else "mixed", shapes[0].dtype, slug(device)]
    if settings.backend != "auto":
        words.append(slug(settings.backend))
    if settings.phase is not None:
        words.append(slug(settings.phase))
    if settings.layers is not None:
        words.append("layers-" + slug(",".join(map(str, sorted(settings.layers)))))
    if settings.steps is not None:
        words.append(f"steps-{settings.steps.start}-{settings.steps.stop - 1}")
    return "-".join(words)


def about(path: Path) -> dict[str, Any]:
    """What a result says of itself.

    Raises:
        ReplayError: It is not a result of a replay.
    """
    try:
        found = pq.read_schema(path).metadata or {}
        said: dict[str, Any] = json.loads(found[KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as e:
        raise ReplayError(f"{path} is not a result of moe-lens replay: {e}") from e
    return said


def _write(path: Path, table: Table, rows: list[Row], about: dict[str, Any]) -> None:
    order = sorted(rows, key=lambda row: tuple(row[name] for name in table.sort))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open_parquet(temporary, table) as writer:
            writer.write_table(pa.Table.from_pylist(order, table.schema))
            writer.add_key_value_metadata({KEY: json.dumps(about).encode()})
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
