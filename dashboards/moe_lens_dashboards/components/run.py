"""The run that a page is about: `OpenRun` asks it stored questions within the sidebar's filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.queries.catalog import question as stored
from moe_lens.queries.imported import no_drops
from moe_lens.queries.info import RunInfo
from moe_lens_dashboards.components import traces
from moe_lens_dashboards.components.filters import Choices, Filters

if TYPE_CHECKING:
    from moe_lens.trace.meta import LayerInfo


@dataclass(frozen=True)
class Asked:
    """An answer, and what was asked."""

    question: str
    parameters: dict[str, Any]
    table: pd.DataFrame
    ignored: tuple[str, ...] = ()
    """Filters that are set and that the question does not know."""
    at_most: int | None = None
    """About so many tokens it looks at, and the run has more; None: at all that fit the filters."""
    of: RunInfo | None = None
    """The run, for what a chart says where there is nothing to draw."""

    @property
    def sql(self) -> str:
        """The query with values put in."""
        return stored(self.question).with_values(self.parameters)


@dataclass(frozen=True)
class OpenRun:
    """A run, and the filters that hold."""

    path: str
    name: str
    """As the sidebar lists it."""
    filters: Filters

    @property
    def info(self) -> RunInfo:
        """What the run holds, whatever the filters."""
        return traces.info(self.path)

    @property
    def layers(self) -> list[LayerInfo]:
        """The layers that the filters leave."""
        first, last = self.filters.first_layer, self.filters.last_layer
        return [
            x
            for x in self.info.layers
            if (first is None or x.layer >= first) and (last is None or x.layer <= last)
        ]

    def look(self) -> None:
        """Look at the files again, where a page does so by itself (the sidebar just did).

        Raises:
            TraceError: The run cannot be read (any more).
        """
        traces.look(self.path)

    def ask(self, question: str, **parameters: Any) -> Asked:
        """Ask a stored question within the filters; what is named here comes before them.

        Raises:
            TraceError: The run cannot be read (any more).
            QueryError: No such question, or a parameter that it does not take.
        """
        known = {p.name: p for p in stored(question).parameters}
        given = self.filters.given()
        ignored = tuple(k for k in given if k not in known and k not in parameters)
        asked = {k: v for k, v in given.items() if k in known} | parameters
        most = asked.get("most", known["most"].default) if "most" in known else None
        at_most = most if most is not None and self.info.token_rows > most else None
        table = no_drops(traces.answer(self.path, question, asked), self.info)
        return Asked(question, asked, table, ignored, at_most, self.info)

    def every(self) -> int:
        """Steps per bucket of a chart over the filtered time."""
        return self.info.every(self.filters.first_step, self.filters.last_step)


def choices(path: str) -> Choices:
    """Look at a run's files, and say what its filters choose from.

    Raises:
        TraceError: It cannot be read.
    """
    traces.look(path)
    info = traces.info(path)
    tags = sorted(set(traces.answer(path, "loss_by_tag", {})["tag"]))
    return Choices([x.layer for x in info.layers], info.phases, tags, info.ranks)
