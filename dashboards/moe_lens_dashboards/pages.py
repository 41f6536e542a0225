"""The pages of the dashboard. A new one is a file in `views/` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from moe_lens.queries.replayed import results

if TYPE_CHECKING:
    from moe_lens_dashboards.components.run import OpenRun


@dataclass(frozen=True)
class View:
    """One page: `views/<name>.py` has a function `page(run)`."""

    name: str
    title: str
    icon: str
    only_with: Callable[[str], object] | None = None
    """Given a run's folder: whether it has what the page shows. None: every run has."""

    @property
    def path(self) -> str:
        """What its address ends in: its name; of the first page, nothing."""
        return "" if self is VIEWS[0] else self.name

    def shown(self, run: OpenRun | None) -> bool:
        """Whether the navigation shows it for this run."""
        return self.only_with is None or (run is not None and bool(self.only_with(run.path)))

    def page(self) -> Callable[[OpenRun], None]:
        """Its function. Pages are imported when they are opened: the first one comes sooner."""
        found: Callable[[OpenRun], None] = import_module(
            f"moe_lens_dashboards.views.{self.name}"
        ).page
        return found


VIEWS = (
    View("overview", "Overview", ":material/monitor_heart:"),
    View("experts", "Experts", ":material/grid_on:"),
    View("capacity", "Capacity", ":material/filter_alt:"),
    View("router", "Router", ":material/alt_route:"),
    View("requests", "Requests", ":material/receipt_long:"),
    View("paths", "Paths", ":material/route:"),
    View("specialisation", "Specialisation", ":material/category:"),
    View("granularity", "Granularity", ":material/science:"),
    View("what_if", "What if", ":material/fork_right:"),
    View("memory", "Memory", ":material/memory:"),
    View("placement", "Placement", ":material/grid_view:"),
    View("compare", "Compare", ":material/compare_arrows:"),
    View("live", "Live", ":material/sensors:"),
    View("sql", "SQL", ":material/terminal:"),
    View("replay", "Replay", ":material/speed:", only_with=results),
)
