"""The phase of a page that never mixes them."""

from __future__ import annotations

from collections.abc import Callable

from moe_lens_dashboards.components.run import Asked, OpenRun

_ORDER = ("decode", "prefill", "eval", "train")
"""The first that has rows is shown where no phase is chosen."""


def first_with_rows(run: OpenRun, ask: Callable[[str], Asked]) -> tuple[str, Asked] | None:
    """The phase that is shown, and its answer; None: no phase within the filters has rows."""
    if run.filters.phase is not None:
        phases = [run.filters.phase]
    else:
        phases = sorted(run.info.phases, key=lambda p: (*_ORDER, p).index(p))
    for phase in phases:
        asked = ask(phase)
        if len(asked.table):
            return phase, asked
    return None
