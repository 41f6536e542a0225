"""What a page says where there is nothing to see: what was not recorded, and how to record it."""

from __future__ import annotations

import streamlit as st

from moe_lens_dashboards.components.words import plain

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
    "rows in these steps": (
        "Nothing was recorded within the filters.",
        "",
    ),
}


def not_recorded(what: str) -> None:
    """Say that something is missing from the trace, and how to record it.

    Args:
        what: One of token rows, token ids, loss, capacity, all-to-all, tags, rows in these steps.
    """
    said, how = _HOW[what]
    st.info(said, icon=":material/info:")
    if how:
        st.caption("To record it:")
        st.code(how, language="python")


def failed(error: Exception) -> None:
    """Show an error of ours: a trace that went away, a query that was refused."""
    for i, line in enumerate(str(error).splitlines()):
        if i == 0:
            st.error(plain(line), icon=":material/error:")
        else:
            st.caption(plain(line))
