"""One open `Trace` per run, shared by everybody who looks, and its answers until files change."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from moe_lens.queries import pairing
from moe_lens.queries.info import RunInfo
from moe_lens.queries.pairing import KEY, numbered
from moe_lens.queries.places import version
from moe_lens.queries.result import Result
from moe_lens.queries.session import Trace, open_trace

if TYPE_CHECKING:
    from moe_lens.metrics.chance import Ints

SKIP_DAMAGED = "MOE_LENS_SKIP_DAMAGED"
"""Environment variable: leave out segments that cannot be read."""


@dataclass
class _Held:
    lock: threading.Lock = field(default_factory=threading.Lock)
    trace: Trace | None = None
    version: str = ""


@st.cache_resource(show_spinner=False)
def _held(path: str) -> _Held:
    return _Held()


def skip_damaged() -> bool:
    """Whether damaged segments are left out."""
    return bool(os.environ.get(SKIP_DAMAGED))


def look(path: str) -> None:
    """Look at the files of a run: answers from now on are of what they hold now.

    Once for each drawing of a page, since a run of many ranks has thousands of files.

    Raises:
        TraceError: It cannot be read (any more).
    """
    held = _held(path)
    with held.lock:
        # Looked at before reading: what is read is at least as new.
        now = version(path)
        if held.trace is None:
            held.trace = open_trace(path, skip_damaged=skip_damaged())
        elif now != held.version:
            held.trace.refresh()
        held.version = now


def current(path: str) -> tuple[Trace, str]:
    """The trace of a run as of the last look, and a text that stands for this state of its files.

    Raises:
        TraceError: It cannot be read.
    """
    held = _held(path)
    if held.trace is None:
        look(path)
    assert held.trace is not None
    return held.trace, held.version


def answer(path: str, question: str, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """A stored question's table, from memory while no file of the run changes.

    Raises:
        TraceError: The run cannot be read.
        QueryError: No such question, or a parameter it does not take.
    """
    trace, now = current(path)
    return _answer(path, now, question, tuple(sorted(parameters.items())), trace).df()


def info(path: str) -> RunInfo:
    """What the run holds.

    Raises:
        TraceError: It cannot be read.
    """
    trace, now = current(path)
    return _info(path, now, trace)


def texts(path: str, rows: pd.DataFrame) -> Ints:
    """Of each sequence, in the order of the rows: a number that sequences of one text share.

    Raises:
        TraceError: The run cannot be read.
    """
    trace, now = current(path)
    return numbered(rows, _of_pair(path, now, trace))


# Streamlit leaves arguments that begin with an underscore out of the key, and pickles what is kept:
# Arrow, since a data frame with lists of experts takes 20 times as long.
@st.cache_data(max_entries=300, show_spinner=False)
def _answer(
    path: str, now: str, question: str, parameters: tuple[tuple[str, Any], ...], _trace: Trace
) -> Result:
    return _trace.query(question, **dict(parameters))


@st.cache_data(max_entries=50, show_spinner=False)
def _of_pair(path: str, now: str, _trace: Trace) -> dict[tuple[int, int], str]:
    return pairing.texts(_trace, KEY, ())


@st.cache_data(max_entries=50, show_spinner=False)
def _info(path: str, now: str, _trace: Trace) -> RunInfo:
    return _trace.info().runs[0]
