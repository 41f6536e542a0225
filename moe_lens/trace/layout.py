"""Where the parts of a trace lie on disk. One place for every path of the format.

RUN/meta/rank=0.json                     one per rank, written by that rank alone
RUN/<table>/rank=0/seg-00000000.parquet  sealed segments
RUN/_open/rank=0/<table>-00000001.arrows Arrow IPC streams of what is not sealed yet
RUN/_open/rank=0/lock                    held by the writer while it lives
RUN/replay/<name>.parquet                timings written by replay
"""

from __future__ import annotations

import re
from pathlib import Path

_SEGMENT = re.compile(r"seg-(\d{8})\.parquet$")
_STREAM = re.compile(r"([a-z_]+)-(\d{8})\.arrows$")


def meta_path(run: Path, rank: int) -> Path:
    """File in which a rank describes itself."""
    return run / "meta" / f"rank={rank}.json"


def segment_dir(run: Path, table: str, rank: int) -> Path:
    """Folder of a table's sealed segments of one rank."""
    return run / table / f"rank={rank}"


def segment_path(run: Path, table: str, rank: int, seq: int) -> Path:
    """A sealed segment."""
    return segment_dir(run, table, rank) / f"seg-{seq:08d}.parquet"


def open_dir(run: Path, rank: int) -> Path:
    """Folder of a rank's open streams."""
    return run / "_open" / f"rank={rank}"


def stream_path(run: Path, table: str, rank: int, seq: int) -> Path:
    """An open stream."""
    return open_dir(run, rank) / f"{table}-{seq:08d}.arrows"


def lock_path(run: Path, rank: int) -> Path:
    """File that a rank's writer locks."""
    return open_dir(run, rank) / "lock"


def ranks(run: Path) -> list[int]:
    """Ranks that left a meta file, ascending."""
    found = (re.fullmatch(r"rank=(\d+)\.json", p.name) for p in (run / "meta").glob("rank=*.json"))
    return sorted(int(m[1]) for m in found if m)


def segments(run: Path, table: str, rank: int) -> dict[int, Path]:
    """Sealed segments of a table: sequence number to path, ascending."""
    found = ((_SEGMENT.fullmatch(p.name), p) for p in segment_dir(run, table, rank).glob("seg-*"))
    return dict(sorted((int(m[1]), p) for m, p in found if m))


def streams(run: Path, rank: int) -> dict[tuple[str, int], Path]:
    """Open streams of a rank: (table, sequence number) to path."""
    found = ((_STREAM.fullmatch(p.name), p) for p in open_dir(run, rank).glob("*.arrows"))
    return {(m[1], int(m[2])): p for m, p in found if m}
