"""Why a trace does not hold something: what to record, or what it was imported from.

A trace that was imported cannot be recorded again: its `lacks` says, in the words of the format's
reader, why something is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Told(Protocol):
    """What says of a trace whether it was imported: its meta file, or `RunInfo`."""

    @property
    def imported(self) -> str:
        """Format and file, as `format: file`; empty: recorded."""

    @property
    def lacks(self) -> Mapping[str, str]:
        """What is not there, and why."""


def origin(told: Told) -> str:
    """The format that a trace was imported from; empty: it was recorded."""
    return told.imported.partition(":")[0]


def not_there(told: Told, *what: str, otherwise: str = "") -> str:
    """The end of a sentence that begins with what is missing: "no gate weights: …".

    Args:
        told: The trace.
        *what: Keys of `lacks`, the one that says most first.
        otherwise: What to say of a recorded trace: how to record it.
    """
    if not told.imported:
        return otherwise
    why = next((told.lacks[name] for name in what if name in told.lacks), "")
    came = f"imported from {origin(told)}"
    return f"{came} ({why})" if why else f"{came}, which does not hold that"


def no_rows(told: Told, *, unowned: bool) -> str:
    """Why nothing can be said of single tokens.

    Args:
        told: The trace.
        unowned: It has rows of routing, but none that say whose tokens they are.
    """
    if unowned:
        why = not_there(told, "sequences", "tokens", otherwise="its table of tokens is gone")
        return f"choices of single tokens, but not whose tokens they are: {why}"
    how = "record with tokens=1.0 (moe-lens record --tokens 1)"
    return f"no per-token rows: {not_there(told, 'tokens', 'sequences', otherwise=how)}"


def made_up(steps: str) -> str:
    """What to say beside numbers of forwards that no engine ran; empty: they were run.

    Args:
        steps: How they were made, as the meta file says.
    """
    if not steps:
        return ""
    return (
        f"No engine ran these forwards: they were made up from sequences ({steps}). What is "
        "counted forward by forward is of such batches."
    )
