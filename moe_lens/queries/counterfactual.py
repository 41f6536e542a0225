"""Results of `moe-lens counterfactual` beside a trace: which there are, what each says of itself.

Their rows are the view `counterfactual`; the questions `expert_importance`, `route_regret` and
`route_changes` sum them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import TraceError
from moe_lens.queries import replayed
from moe_lens.trace.reader import RunFiles
from moe_lens.trace.schema import COUNTERFACTUAL


def results(run: str | Path) -> list[str]:
    """Names of the results that a run has, in order: `counterfactual/<name>.parquet`."""
    return replayed.results(run, COUNTERFACTUAL)


def newest_first(run: str | Path) -> list[str]:
    """Names of the results, the one that was written last first."""
    return sorted(results(run), key=lambda name: _written(run, name), reverse=True)


def _written(run: str | Path, name: str) -> int:
    try:
        return (Path(run) / COUNTERFACTUAL.name / f"{name}.parquet").stat().st_mtime_ns
    except OSError:  # it has its final name by now
        return 0


def about(run: str | Path, name: str) -> dict[str, Any]:
    """What a result says of itself: model, tokens, layers, what was refused, `interrupted`.

    Raises:
        TraceError: There is no such result; or its file is still being written, or damaged, or
            written by another program.
    """
    said = replayed.about(run, name, COUNTERFACTUAL)
    if said is None or not _has_rows(Path(run) / COUNTERFACTUAL.name / f"{name}.parquet"):
        raise TraceError(f"{name}.parquet is not a result of moe-lens counterfactual.")
    return said


def result_files(runs: Mapping[str, RunFiles]) -> Iterator[tuple[str, str, Path]]:
    """Run, name and file of every result; files of others, and unfinished ones, are left out."""
    for run, files in runs.items():
        for name in results(files.path):
            try:
                about(files.path, name)
            except TraceError:
                continue
            yield run, name, files.path / COUNTERFACTUAL.name / f"{name}.parquet"


def _has_rows(path: Path) -> bool:
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False
    return all(f.name in schema.names and schema.field(f.name).type == f.type
               for f in COUNTERFACTUAL.schema)  # fmt: skip
