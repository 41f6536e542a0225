"""What a page says where there is nothing to see: what was not recorded, and how to record it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from moe_lens.lacking import made_up, not_there
from moe_lens_dashboards.components.words import plain

if TYPE_CHECKING:
    from moe_lens_dashboards.components.run import OpenRun

_HOW = {
    "token rows": (
        "No rows of single tokens were kept.",
        'moe_lens.record(model, "traces/run1", tokens=0.05)   # those of 5 % of the sequences',
    ),
    "token ids": (
        "The ids of the tokens were not kept.",
        'moe_lens.record(model, "traces/run1", tokens=0.05, token_ids=True)',
    ),
    "loss": (
        "No loss was recorded.",
        "with rec.step():\n    loss_BS = …   # one per token, unreduced\n    rec.loss(loss_BS)",
    ),
    "capacity": (
        "No choice found its expert full: no capacity applied, or it was never reached.",
        "",
    ),
    "all-to-all": (
        "No all-to-all was seen: the experts were all on the rank of their tokens.",
        "",
    ),
    "tags": (
        "All tokens have the same tag.",
        'with rec.step(tags=["code", "prose"]): …   # one for each sequence of the batch',
    ),
    "times": ("The trace has no times of forwards.", ""),
    "rows in these steps": (
        "Nothing was recorded within the filters.",
        "",
    ),
}


_IMPORTED = {
    "token ids": ("No token ids", "token ids"),
    "loss": ("No losses", "losses"),
    "capacity": ("What was dropped is not known", "drops"),
    "times": ("The trace has no times", "times"),
}
"""Of an imported trace: what is missing, and the key of what it says that it lacks."""


def not_recorded(run: OpenRun, what: str) -> None:
    """Say that something is missing from the trace, and how to record it, or why it is not there.

    Args:
        run: The run.
        what: One of token rows, token ids, loss, capacity, all-to-all, tags, times,
            rows in these steps.
    """
    said, how = _HOW[what]
    if run.info.imported:
        said, how = _of_imported(run, what) or said, ""
    st.info(said, icon=":material/info:")
    if how:
        st.caption("To record it:")
        st.code(how, language="python")


def _of_imported(run: OpenRun, what: str) -> str:
    if what == "token rows":
        return plain(f"This trace has {run.info.no_rows}.")
    if what not in _IMPORTED:
        return ""
    missing, key = _IMPORTED[what]
    return plain(f"{missing}: {not_there(run.info, key)}.")


def made_up_note(run: OpenRun) -> None:
    """Say beside numbers of forwards that no engine ran them, where that is so."""
    if run.info.made_steps:
        st.caption(plain(made_up(run.info.made_steps)))


def failed(error: Exception) -> None:
    """Show an error of ours: a trace that went away, a query that was refused."""
    for i, line in enumerate(str(error).splitlines()):
        if i == 0:
            st.error(plain(line), icon=":material/error:")
        else:
            st.caption(plain(line))
