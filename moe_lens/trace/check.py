"""Is this folder a trace, is this segment whole: the questions asked before anything is read."""

from __future__ import annotations

from pathlib import Path

from moe_lens.errors import TraceError
from moe_lens.trace import layout

_MAGIC = b"PAR1"
_SMALLEST = 12  # magic, footer length, magic


def check_place(run: Path) -> None:
    """Raise what is wrong with a path that cannot be a trace.

    Raises:
        TraceError: Nothing there, a file, or a folder that holds no trace of ours.
    """
    if not run.exists():
        raise TraceError(f"{run} does not exist. A trace is the folder that moe_lens.record wrote.")
    if not run.is_dir():
        raise TraceError(
            f"{run} is a file; a trace is a folder. A single Parquet file opens in DuckDB or "
            "pandas directly."
        )
    if layout.ranks(run):
        return
    entries = sorted(p.name for p in run.iterdir())
    if not entries:
        raise TraceError(f"{run} is an empty folder: nothing was recorded into it yet.")
    if (run / "_open").is_dir() or (run / "meta").is_dir():
        raise TraceError(
            f"{run} has no meta/rank=N.json, which a writer writes first: it is starting just now, "
            "or the file was lost and with it what the layers are."
        )
    runs = [name for name in entries if (run / name).is_dir() and layout.ranks(run / name)]
    if runs:
        raise TraceError(
            f"{run} is a folder of traces, not a trace. Open one or several of those in it: "
            + _some(runs)
        )
    raise TraceError(f"{run} is not a moe_lens trace: no meta/rank=N.json, but {_some(entries)}.")


def segment_damage(path: Path) -> str | None:
    """What is wrong with a Parquet segment, from its first 4 and last 8 bytes; None: it is whole.

    Raises:
        FileNotFoundError: It is gone (a disk bound removes the oldest).
    """
    with path.open("rb") as f:
        head = f.read(4)
        size = f.seek(0, 2)
        if size == 0:
            return "it is empty (0 bytes)"
        if size < _SMALLEST or head != _MAGIC:
            return f"its {size:,} bytes do not start as a Parquet file"
        f.seek(-8, 2)
        tail = f.read(8)
    if tail[4:] != _MAGIC:
        return f"it was cut off: after {size:,} bytes there is no Parquet footer"
    footer = int.from_bytes(tail[:4], "little")
    if footer > size - _SMALLEST:
        return f"its footer says {footer:,} bytes, the file has {size:,}"
    return None


def _some(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
