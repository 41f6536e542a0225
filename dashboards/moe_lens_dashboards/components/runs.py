"""Which runs the dashboard was started on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import streamlit as st

from moe_lens.errors import TraceError
from moe_lens.queries.about import unique_names
from moe_lens.queries.laboratory import laboratories
from moe_lens.queries.places import find_runs

RUNS = "MOE_LENS_RUNS"
"""Environment variable: JSON list of the folders that were named, of runs or with runs in them."""


def listed() -> dict[str, Path]:
    """The runs by name: as they were named, and in a folder of runs the newest first.

    A run that was named stays listed when it is gone, so that its page can say so.
    """
    return _listed(os.environ.get(RUNS, "[]"))


def labs() -> dict[str, Path]:
    """The granularity laboratories in the folders that were named, by name."""
    return _labs(os.environ.get(RUNS, "[]"))


@st.cache_data(ttl=5, show_spinner=False)
def _labs(places: str) -> dict[str, Path]:
    found = [lab for place in json.loads(places) for lab in laboratories(place)]
    return unique_names(list(dict.fromkeys(found))) if found else {}


@st.cache_data(ttl=5, show_spinner=False)
def _listed(places: str) -> dict[str, Path]:
    found: list[Path] = []
    for place in json.loads(places):
        try:
            found += find_runs(place)
        except TraceError:
            found.append(Path(place))
    return unique_names(list(dict.fromkeys(p.resolve() for p in found)))
