"""Reading a trace's files: which there are, which can be read, what is still in open streams.

`open_run` takes a snapshot that stays consistent while a writer works. The writer appends to
`_open/rank=R/<table>-<seq>.arrows`; to seal, it renames a complete `seg-<seq>.parquet` into place
and only then deletes the stream. So the snapshot lists streams first and segments second: a row
that moves meanwhile is seen in its segment, never in neither. Readers never write, and never open
the writer's lock file (closing it would drop the lock of a writer in the same process).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from moe_lens.errors import TraceError
from moe_lens.trace import layout
from moe_lens.trace.check import check_place, segment_damage
from moe_lens.trace.meta import Meta, read_meta
from moe_lens.trace.schema import LOAD_COARSE, with_keys

COUNT_TABLES = ("load", "load_coarse", "layers", "routers", "slices", "steps")
"""Tables of sums, which leave out ranks whose tokens another rank has too (`Meta.counts`)."""

_TRIES = 100


@dataclass
class RunFiles:
    """What one run had on disk at one moment."""

    path: Path
    metas: dict[int, Meta]
    segments: dict[str, dict[int, list[Path]]] = field(default_factory=dict)
    """Readable sealed segments: table (and `load_coarse`), rank, oldest first."""
    streams: dict[str, dict[int, pa.Table]] = field(default_factory=dict)
    """Rows not sealed yet: table, rank. Mapped from the files: no memory until they are read."""
    missing_ranks: list[int] = field(default_factory=list)
    """Ranks that should be here (`Meta.world`, or files of theirs) and have no meta file."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Segments left out because they cannot be read, and why (only with `skip_damaged`)."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes on disk by table, open streams included."""
    last_write_ns: int = 0
    """When an open stream last grew, ns since the epoch; 0 where there is none."""

    @property
    def meta(self) -> Meta:
        """The meta of the lowest rank, which stands for the run."""
        return self.metas[min(self.metas)]

    @property
    def unfinished(self) -> bool:
        """A writer is at work, or died: rows wait in open streams and an attempt has no end."""
        attempts = [m.attempts[-1] for m in self.metas.values() if m.attempts]
        return any(a.ended_ns is None for a in attempts) or bool(self.streams)

    def ranks(self, table: str) -> list[int]:
        """Ranks whose rows of this table count."""
        copies = table in COUNT_TABLES
        return [r for r, m in self.metas.items() if not (copies and m.counts == "copy")]


def open_run(
    path: str | Path, *, skip_damaged: bool = False, checked: AbstractSet[Path] = frozenset()
) -> RunFiles:
    """Take a snapshot of a run's files.

    Args:
        path: Folder of the run.
        skip_damaged: Leave out segments that cannot be read, and list them, instead of raising.
        checked: Segments known to be whole (from an earlier snapshot): not looked into again.

    Raises:
        TraceError: Not a trace, of a newer format, or a damaged one.
    """
    run = Path(path)
    check_place(run)
    for _ in range(_TRIES):
        try:
            return _snapshot(run, skip_damaged, checked)
        except FileNotFoundError:
            continue  # a stream was sealed, or a segment pruned, between listing and opening it
    raise TraceError(f"{run} changes faster than it can be listed. Try again.")


def read_stream(path: Path) -> pa.Table | None:
    """Rows of an open stream; a torn tail is left out.

    Returns:
        The complete batches, mapped rather than copied; None where not even the schema is complete.

    Raises:
        FileNotFoundError: It is gone, which is how a writer says that it was sealed.
    """
    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError):
        return None
    batches = []
    while True:
        try:
            batches.append(reader.read_next_batch())
        except (StopIteration, pa.ArrowInvalid, OSError):
            break  # the end, or a batch that was being appended when we looked or the writer died
    return pa.Table.from_batches(batches, reader.schema)


def superseded_from(meta: Meta) -> dict[int, int]:
    """For each attempt that a later one overtook, the first step at which its rows do not count."""
    found: dict[int, int] = {}
    for earlier in meta.attempts:
        later = [
            a.first_step
            for a in meta.attempts
            if a.attempt > earlier.attempt and a.first_step is not None
        ]
        if later:
            found[earlier.attempt] = min(later)
    return found


def _snapshot(run: Path, skip_damaged: bool, checked: AbstractSet[Path]) -> RunFiles:
    ranks = layout.ranks(run)
    listed = {rank: layout.streams(run, rank) for rank in ranks}
    # Metas last: a resumed attempt names its first step there before it writes a row of it.
    segments = {rank: _segments(run, rank) for rank in ranks}
    files = RunFiles(run, {rank: read_meta(layout.meta_path(run, rank)) for rank in ranks})
    for rank in ranks:
        _add_segments(files, rank, segments[rank], skip_damaged, checked)
        _add_streams(files, rank, listed[rank], segments[rank])
    _agree(files)
    world = {*range(max(m.world for m in files.metas.values())), *_ranks_with_rows(run)}
    files.missing_ranks = sorted(world - set(ranks))
    return files


def _segments(run: Path, rank: int) -> dict[str, dict[int, Path]]:
    return {n: layout.segments(run, n, rank) for n in (*with_keys(()), LOAD_COARSE.name)}


def _add_segments(
    files: RunFiles,
    rank: int,
    segments: dict[str, dict[int, Path]],
    skip_damaged: bool,
    checked: AbstractSet[Path],
) -> None:
    for table, by_seq in segments.items():
        for path in by_seq.values():
            reason = None if path in checked else segment_damage(path)
            files.bytes[table] = files.bytes.get(table, 0) + path.stat().st_size
            if reason is not None and table == LOAD_COARSE.name:
                continue  # nothing is lost: what it sums is there
            if reason is None:
                files.segments.setdefault(table, {}).setdefault(rank, []).append(path)
            elif skip_damaged:
                files.damaged[path] = reason
            else:
                raise TraceError(
                    f"{path} is damaged: {reason}. moe_lens.open(..., skip_damaged=True) or "
                    "--skip-damaged reads the rest and lists what it left out."
                )


def _add_streams(
    files: RunFiles,
    rank: int,
    listed: dict[tuple[str, int], Path],
    segments: dict[str, dict[int, Path]],
) -> None:
    parts: dict[str, list[pa.Table]] = defaultdict(list)
    for (table, seq), path in sorted(listed.items()):
        if seq in segments.get(table, {}):
            continue  # sealed, not removed yet
        rows = read_stream(path)
        stat = path.stat()
        files.bytes[table] = files.bytes.get(table, 0) + stat.st_size
        files.last_write_ns = max(files.last_write_ns, stat.st_mtime_ns)
        if rows is not None:
            parts[table].append(rows)
    for table, found in parts.items():
        rows = pa.concat_tables(found, promote_options="default")
        files.streams.setdefault(table, {})[rank] = rows


def _agree(files: RunFiles) -> None:
    ids = {rank: m.run_id for rank, m in files.metas.items()}
    if len(set(ids.values())) > 1:
        text = ", ".join(f"rank {rank}: {run_id}" for rank, run_id in ids.items())
        raise TraceError(
            f"{files.path} holds ranks of different runs ({text}). Give each run a folder of its "
            "own, and remove from meta/ what does not belong here."
        )


def _ranks_with_rows(run: Path) -> set[int]:
    """Ranks that have a folder of rows: one of them may lack its meta file."""
    names = [p.name for table in (*with_keys(()), "_open") for p in (run / table).glob("rank=*")]
    return {int(n.removeprefix("rank=")) for n in names if n.removeprefix("rank=").isdigit()}
