"""Which runs there are below a folder, and whether the files of a run changed.

For programs that stay open (the dashboard): they hold a `Trace`, and call `refresh` when `version`
says that there is something new.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from moe_lens.trace import layout
from moe_lens.trace.check import check_place

_DEPTH = 4
"""Folders between the one that was named and a run: deeper is not looked for."""


def find_runs(place: str | Path) -> list[Path]:
    """The runs at or below a folder: itself, if it is one, else those in it, newest first.

    Raises:
        TraceError: No such folder, or no trace at or below it; says what is there instead.
    """
    root = Path(place)
    if root.is_dir() and not layout.ranks(root):
        found = [each for each in folders_below(root) if layout.ranks(each)]
        if found:
            return sorted(found, key=_started, reverse=True)
    check_place(root)
    return [root]


def folders_below(folder: str | Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The folders in a folder, and in those, but for what lies in a run; in order of names."""
    for each in _folders(Path(folder)):
        yield each
        if depth > 1 and not layout.ranks(each):
            yield from folders_below(each, depth - 1)


def version(run: str | Path) -> str:
    """A text that changes whenever a file of the run appears, goes, grows or is written again."""
    digest = hashlib.blake2b(digest_size=16)
    for name, size, changed in sorted(_files(str(run), "")):
        digest.update(f"{name}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and e.name[0] != ".")
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        return []  # not ours to read, or just removed


def _started(run: Path) -> int:
    """When the lowest rank wrote its meta file last: at the start of a run, and at its end."""
    try:
        return layout.meta_path(run, min(layout.ranks(run), default=0)).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _files(folder: str, prefix: str) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if entry.is_dir():
                    found += _files(entry.path, f"{name}/")
                else:
                    stat = entry.stat()
                    found.append((name, stat.st_size, stat.st_mtime_ns))
    except FileNotFoundError:
        pass  # removed while we looked: the next look differs from this one
    return found
