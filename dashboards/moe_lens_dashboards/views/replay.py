"""Replay: what was measured by running the routing of the trace again."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from moe_lens.errors import TraceError
from moe_lens.figures.replay_layers import replay_layers
from moe_lens.numbers import count
from moe_lens.queries.info import phase_order
from moe_lens.queries.replayed import about, replayed, results
from moe_lens_dashboards.components import columns
from moe_lens_dashboards.components.notices import failed, made_up_note
from moe_lens_dashboards.components.run import OpenRun
from moe_lens_dashboards.components.show import show
from moe_lens_dashboards.components.words import plain

_ROWS = 5_000


def page(run: OpenRun) -> None:
    """Draw the page."""
    names = results(run.path)
    if not names:
        st.info("This run has no results of a replay.", icon=":material/info:")
        st.code(f"moe-lens replay {run.path}", language="sh")
    for name in names:
        st.subheader(plain(name), anchor=False)
        try:
            said = about(run.path, name)
            if said is None:
                _of_others(run, name)
            else:
                _measured(run, name, said)
        except TraceError as e:
            failed(e)


def _measured(run: OpenRun, name: str, said: dict[str, Any]) -> None:
    if said.get("state") != "complete":
        st.warning(
            "This replay was interrupted: it has some of its forwards.", icon=":material/pause:"
        )
    st.caption(plain(_setting(said)))
    made_up_note(run)
    asked = run.ask("replay_layers", result=name)
    if asked.table.empty:
        st.info("Nothing of it lies within the filters.", icon=":material/info:")
    for phase in sorted(asked.table["phase"].unique(), key=phase_order):
        rows = asked.table[asked.table["phase"] == phase]
        show(replay_layers(rows), asked)
        _table(rows)


def _setting(said: dict[str, Any]) -> str:
    """Where and how it ran, in a line."""
    policy = said.get("policy", {})
    words = [f"Policy {policy.get('name')}"]
    if policy.get("capacity_factor") is not None:
        words.append(f"capacity factor {policy['capacity_factor']:g} by {policy.get('by')}")
    if policy.get("top_k") is not None:
        words.append(f"top-{policy['top_k']}")
    shapes = said.get("shapes", [])
    sizes = sorted({f"{s['hidden']} × {s['intermediate']} {s['dtype']}" for s in shapes})
    backends = ", ".join(said.get("backends", {}))
    words += [*sizes, str(said.get("device_name")), f"backend {backends}", str(said.get("clock"))]
    return "; ".join(words) + "."


def _table(rows: pd.DataFrame) -> None:
    shown = {
        "layer": columns.whole("layer"),
        "p50_ms": columns.number("p50, ms"),
        "p90_ms": columns.number("p90", help="Of 10 forwards or more; of fewer, see max."),
        "p99_ms": columns.number(
            "p99", help="Of 100 forwards or more, never over repeats; of fewer, see max."
        ),
        "max_ms": columns.number("max", help="The slowest forward."),
        "over_floor": columns.number("time / floor", 1),
        "over_balanced": columns.number("time / balanced", 2),
        "over_same_touched": columns.number(
            "time / same experts", 2, help="Balanced over the experts that this routing touches."
        ),
        "noise": columns.share("A/A noise", help="What two timings of the same work differ by."),
        "touched": columns.number("touched experts", 0),
        "rows_max": columns.whole("most rows"),
        "dropped_share": columns.share("dropped"),
        "rerouted_share": columns.share("rerouted"),
    }
    st.dataframe(rows[list(shown)], hide_index=True, column_config=shown)


def _of_others(run: OpenRun, name: str) -> None:
    found = replayed(run.path, name, _ROWS)
    st.dataframe(found.df(), hide_index=True)
    if len(found) == _ROWS:
        st.caption(f"The first {count(_ROWS)} rows.")
